"""Codecs of the user's own (`wire.codec`): built from the config, and tried once on the first model before round 1."""

from __future__ import annotations

import json
from typing import cast

import torch
from torch import Tensor

from fl_sim.codecs import Codec, CorruptPayload, Schema
from fl_sim.communication.exchange import Coding, Exchange, OwnCoding
from fl_sim.config.codecs import CodecTarget
from fl_sim.config.experiment import Experiment
from fl_sim.config.sections import WireSection
from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.lookup import takes
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import Params, UserError
from fl_sim.runtime.client.update_validation import BadUpdate, kept
from fl_sim.simulation.round_budget import budget_codings

CALLS = {"encode": ("tensors", "state", "rng"), "decode": ("data", "schema")}
"""Method of a codec -> what it is called with."""


def coding_of(wire: WireSection, way: str) -> Coding:
    """The encoding of a direction, `uplink` or `downlink`, with the codec that the config names.

    Raises:
        UserError: no such codec, not with these options, or something that is no codec.
    """
    plain = cast(Coding, getattr(wire, way))
    named = None if wire.codec is None else cast("CodecTarget | None", getattr(wire.codec, way))
    if named is None:
        return plain
    options = f" {json.dumps(named.options, sort_keys=True)}" if named.options else ""
    return OwnCoding(content=plain.content, codec=codec_of(named, f"wire.codec.{way}"), name=named.target + options)


def codings_of(experiment: Experiment) -> tuple[Coding, Coding]:
    """The encoding of uplink and downlink: `coding_of` each, or what a byte budget leaves to it."""
    wire = experiment.wire
    if wire.budget is not None:
        return budget_codings(experiment, wire.budget)
    return coding_of(wire, "uplink"), coding_of(wire, "downlink")


def codec_of(named: CodecTarget, key: str) -> Codec:
    """Build a codec; `key` starts the error message.

    Raises:
        UserError: as `coding_of`.
    """
    where = f"{key} = {named.target!r}"
    try:
        made = named.build({}, key)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    for name, arguments in CALLS.items():
        method = getattr(made, name, None)
        if not callable(method) or isinstance(made, type):
            raise UserError(
                f"{where}: a {type(made).__name__} without {name}({', '.join(arguments)}); needed: a class with encode and decode"
            )
        takes(f"{where}: {name}", method, *arguments)
    return cast(Codec, made)


def try_codecs(exchange: Exchange, initial: Params) -> None:
    """Encode and decode two messages of a model with each codec of the user's own.

    Raises:
        UserError: names the codec, and what is wrong with it.
    """
    for way, coding in (("uplink", exchange.uplink), ("downlink", exchange.downlink)):
        if not isinstance(coding, OwnCoding):
            continue
        where, schema = f"wire.codec.{way}: {coding.name}", exchange.schema
        if not schema.prunable_size:
            raise UserError(f"{where}: codes weight matrices and kernels, and none travels; allowed: no codec")
        _tried(coding, schema, initial, where)


def _tried(coding: OwnCoding, schema: Schema, initial: Params, where: str) -> None:
    """Two messages, of which the second finds what the codec kept of the first."""
    start, state = schema.flat(initial), dict[str, Tensor]()
    moved = schema.view(start + 0.01 * torch.randn(start.shape, generator=generator(0, Purpose.ENCODING)))
    for seed in range(2):
        try:
            data = coding.encode(moved, None, initial, schema=schema, held_mask=None, seed=seed, state=state)
        except USERS_OWN as error:  # the user's own, whatever it is
            said = str(error) if isinstance(error, UserError) else f"encode raised {error_line(error)}"
            raise UserError(f"{where}: {said}") from error
        try:
            coding.decode(data, initial, schema=schema, held_mask=None)
            state = kept(state, "the codec's state")
        except (CorruptPayload, BadUpdate) as error:
            raise UserError(f"{where}: {str(error).removeprefix(f'{coding.name}: ')}") from error
