"""Decoding of a reply into an update, wherever that happens: on the server, or on a worker that folds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from flwr.app import RecordDict

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Description
from fl_sim.codecs.sections import extra_section
from fl_sim.communication import messages as wire
from fl_sim.communication.exchange import Exchange
from fl_sim.core.types import Mask, Params
from fl_sim.sparsity import layer_densities
from strategies.blocks import Placed


class Decoded(NamedTuple):
    """An update, with what is booked of it.

    Attributes:
        update: as the server knows it.
        described: sections of the payload, and of extra tensors.
        payload: its bytes.
    """

    update: Placed
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


def decoded(
    exchange: Exchange, content: RecordDict, start: Params, held_mask: Mask | None, *, block: int = 0
) -> Decoded:
    """Decode a reply of a client of a block that started from these parameters, under this pruning mask.

    Raises:
        Rejected: its bytes are no update of this federation.
    """
    described = None
    try:
        payload = codecs.opened(wire.payload(content), schema=exchange.schema, held_mask=held_mask)
        extra_payloads = wire.extra_payloads(content)
        described = _with_extra(payload.described(), extra_payloads, exchange.extra.up)
        count, metrics = wire.read_metrics(content)
        params, upload_mask = exchange.uplink.restore(payload, start)
        extra = exchange.extra.decode(exchange.extra.up, extra_payloads, held_mask)
    except CorruptPayload as error:
        raise Rejected(str(error), described or Description.opaque(wire.array_bytes(content))) from error
    return Decoded(Placed(params, count, upload_mask, metrics, extra, block), described, payload.data)


def _with_extra(
    described: Description, payloads: Mapping[str, bytes | memoryview], declared: Collection[str]
) -> Description:
    """A description with the sections of extra tensors; names that nobody declared are booked as header."""
    for name, payload in payloads.items():
        described = described.plus(extra_section(name) if name in declared else "header", len(payload))
    return described
