"""Codecs of the user's own in a config: by import path, by a name of `CODECS`, or by the name of an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fl_sim.config.target import Target, or_preset
from fl_sim.core.given import path_of
from fl_sim.core.lookup import nearest
from fl_sim.core.types import UserError

GROUP = "fl_sim.codecs"
"""Group of entry points in which an installed package names its codecs."""
CODECS: Mapping[str, str] = {
    "signsgd": "clients.sign_codec:SignSGD",
    "powersgd": "clients.low_rank_codec:PowerSGD",
    "atomo": "clients.spectral_codec:Atomo",
    "drive": "clients.rotation_codec:Drive",
    "eden": "clients.eden_codec:Eden",
    "sketch": "clients.sketch_codec:CountSketch",
}
"""Name -> import path of the codecs that come with fl-sim."""


def codec_path(given: object) -> object:
    """The import path of a codec; anything that is no name, as it is.

    Raises:
        UserError: a name that neither fl-sim nor an installed package has.
    """
    named = path_of(given)
    if not isinstance(named, str) or ":" in named:
        return named
    found = {**{entry.name: entry.value for entry in entry_points(group=GROUP)}, **CODECS}
    if named not in found:
        raise UserError(
            f"codec {named!r}: no such codec{nearest(named, list(found))}; or module:name of your own, or an entry point of "
            f"the group {GROUP!r}"
        )
    return found[named]


class CodecTarget(Target):
    """A codec, with its options."""

    target: Annotated[str, BeforeValidator(codec_path)] = Field(
        CODECS["signsgd"],
        description="a class with `encode` and `decode`: module:name, or a name of `fl-sim list codecs`; further keys of the "
        "table are its options",
    )


Named = Annotated[CodecTarget | None, or_preset(CODECS["signsgd"])]


class CodecSection(BaseModel):
    """Codecs of your own, or of `fl-sim list codecs`, in the place of a value type; each codes the prunable tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uplink: Named = Field(None, description="codec of what clients send; what it keeps is kept for each client")
    downlink: Named = Field(
        None, description="codec of what the server sends; beside `wire.broadcast` of the change, with error feedback"
    )
