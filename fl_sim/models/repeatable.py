"""Whether a user's builder makes the same model each time: in the next process, in a resumed run, when a saved model is opened."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fl_sim.core.errors import UserError
from fl_sim.models.content import digest_of
from fl_sim.models.module_state import ModuleState
from fl_sim.models.parameters import tensors

REST = "tensors, arrays or generators that it keeps as attributes"
"""What of a model's contents has no name in its state dict."""


def contents_of(model: nn.Module) -> dict[str, str]:
    """Name -> hash of every parameter and buffer of a model, and `REST` -> hash of what else it computes with."""
    named = {name: digest_of(tensor) for name, tensor in tensors(model).items()}
    return {**named, REST: ModuleState(model, named).digest()}


def require_repeatable(name: str, first: Mapping[str, str], again: nn.Module) -> None:
    """Complain of a builder that makes other contents the second time: the next process or run would get another model.

    Args:
        name: the model's name, for the message.
        first: `contents_of` the first model.
        again: a second one, of the same seed.

    Raises:
        UserError: names what differs.
    """
    found = contents_of(again)
    if differing := [key for key in first if found.get(key) != first[key]]:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"model.name = {name!r}: built twice from one seed, it has other values in {differing[0]}{more}; draw them from the "
            "global generators, which are seeded when the model is built, or from a generator of your own with a fixed seed"
        )
