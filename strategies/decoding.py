"""Decoding of a reply into an update, wherever that happens: on the server, or on a worker that folds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from flwr.app import RecordDict

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Description, Opened
from fl_sim.codecs.sections import extra_section
from fl_sim.communication import messages as wire
from fl_sim.communication.exchange import Exchange
from fl_sim.core.types import Mask, Metrics, Params, Update
from fl_sim.sparsity import layer_densities


class Decoded(NamedTuple):
    """An update, with what is booked of it.

    Attributes:
        update: as the server knows it.
        described: sections of the payload, and of extra tensors.
        payload: its bytes.
    """

    update: Update
    described: Description
    payload: bytes | memoryview

    @property
    def chosen(self) -> Mapping[str, float] | None:
        """Layer -> share of it that was sent, where the client chose what to send."""
        mask = self.update.mask
        return None if mask is None or self.described.mask_mode == "held" else layer_densities(mask)


class Rejected(Exception):
    """The bytes are no update of this federation; `described` is what is booked of them."""

    def __init__(self, reason: str, described: Description) -> None:
        super().__init__(reason)
        self.described = described


class _Read(NamedTuple):
    """A reply of which everything is read but the values."""

    payload: Opened
    extra: Mapping[str, bytes | memoryview]
    described: Description
    examples: int
    metrics: Metrics


def decoded(exchange: Exchange, content: RecordDict, start: Params, held_mask: Mask | None) -> Decoded:
    """Decode a reply of a client that started from these parameters, under this pruning mask.

    Raises:
        Rejected: its bytes are no update of this federation.
    """
    return _finished(_read(exchange, content, held_mask), exchange, start, held_mask)


def decoded_all(
    exchange: Exchange, contents: Sequence[RecordDict], start: Params, held_mask: Mask | None
) -> list[Decoded | Rejected]:
    """What `decoded` makes of each of several replies, or why it rejects one; their values are decoded together where they are
    alike."""
    found: list[_Read | Rejected] = []
    for content in contents:
        try:
            found.append(_read(exchange, content, held_mask))
        except Rejected as problem:
            found.append(problem)
    read = [each for each in found if isinstance(each, _Read)]
    values = iter(exchange.restore_up_all([each.payload for each in read], start))
    made: list[Decoded | Rejected] = []
    for each in found:
        try:
            made.append(
                each if isinstance(each, Rejected) else _finished(each, exchange, start, held_mask, next(values))
            )
        except Rejected as problem:
            made.append(problem)
    return made


def _read(exchange: Exchange, content: RecordDict, held_mask: Mask | None) -> _Read:
    described = None
    try:
        payload = codecs.opened(wire.payload(content), schema=exchange.schema, held_mask=held_mask)
        extra = wire.extra_payloads(content)
        described = _with_extra(payload.described(), extra, exchange.extra.up)
        return _Read(payload, extra, described, *wire.read_metrics(content))
    except CorruptPayload as error:
        raise Rejected(str(error), described or Description.opaque(wire.array_bytes(content))) from error


def _finished(
    read: _Read,
    exchange: Exchange,
    start: Params,
    held_mask: Mask | None,
    values: tuple[Params, Mask | None] | None = None,
) -> Decoded:
    """The update of a reply, of which `values` may have been decoded together with others."""
    try:
        params, upload_mask = exchange.uplink.restore(read.payload, start) if values is None else values
        extra = exchange.extra.decode(exchange.extra.up, read.extra, held_mask)
    except CorruptPayload as error:
        raise Rejected(str(error), read.described) from error
    return Decoded(Update(params, read.examples, upload_mask, read.metrics, extra), read.described, read.payload.data)


def _with_extra(
    described: Description, payloads: Mapping[str, bytes | memoryview], declared: Collection[str]
) -> Description:
    """A description with the sections of extra tensors; names that nobody declared are booked as header."""
    for name, payload in payloads.items():
        described = described.plus(extra_section(name) if name in declared else "header", len(payload))
    return described
