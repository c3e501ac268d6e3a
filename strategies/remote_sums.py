"""Blocks of updates that workers add up: what they need for that, and the sums as they travel.

    blocks = foldable(slots, context, start, cohort=256)                  # None: the server needs single updates
    replies = grid.send_and_fold(messages, blocks)                        # receipts, and one message of sums for each block

The sums of a block are the same to the bit wherever they are made (`strategies.blocks`). A worker decodes and checks each reply
as the server does, and sends the sums once they are smaller than the replies together; else these travel as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.communication import messages as wire
from fl_sim.communication.exchange import CONTENTS, Exchange, OwnCoding
from fl_sim.communication.flower_private import array_of, filled
from fl_sim.communication.flower_traffic import protocol_bytes
from fl_sim.core.types import Mask, Params
from fl_sim.runtime.grids.folding import Blocks, Receipt
from fl_sim.runtime.server_context import ServerContext
from strategies.accumulators import Accumulator
from strategies.aggregation import weights_of_sums
from strategies.blocks import Summed, blocks_of
from strategies.decoding import Rejected, decoded
from strategies.distillation import no_distillation
from strategies.server_step import ServerState
from strategies.slots import Slots
from strategies.sums import Sums, statistics

SUMS, NUMBERS, START = "sums", "numbers", "start"
STYPE = "fl_sim.sums/1"


def foldable(slots: Slots, context: ServerContext, start: ServerState, cohort: int) -> Blocks | None:
    """What workers may fold in a round whose clients start from this state; None where the server needs each update.

    It does where the aggregation rule is none of `strategies.aggregation.LINEAR`, for distillation, extra tensors, recorded masks
    or payloads, simulated links, and a codec of the user's own. A cohort of one block is folded by the server.
    """
    weights, exchange, accounting = weights_of_sums(slots.aggregate), context.exchange, context.accounting
    places = blocks_of(cohort)
    if weights is None or len(places) < 2 or slots.distil is not no_distillation:
        return None
    if exchange.extra.up or isinstance(exchange.uplink, OwnCoding):
        return None
    if accounting.recorder is not None or accounting.payloads is not None:
        return None
    if accounting.network.links or context.devices is not None:
        return None
    schema = exchange.schema
    fold = SumsOfBlock(Exchange(schema, uplink=exchange.uplink), equal=weights == "equal")
    return Blocks(fold, _start(fold.exchange, start), places, 8 * schema.size)


def _start(exchange: Exchange, start: ServerState) -> RecordDict:
    """What a worker needs of the model to decode uploads: the pruning mask, and the parameters where uploads are relative."""
    arrays: dict[str, object] = {}
    if start.mask is not None:
        arrays["mask"] = _array(np.packbits(exchange.schema.flat_mask(start.mask).numpy()))
    if _is_relative(exchange):
        arrays["params"] = _array(exchange.schema.flat(start.params).numpy())
    return filled(RecordDict, {START: filled(ArrayRecord, arrays)} if arrays else {})


def _is_relative(exchange: Exchange) -> bool:
    uplink = exchange.uplink
    return CONTENTS[uplink.content].incoming is not None or codecs.is_relative(uplink.values)


@dataclass(frozen=True)
class SumsOfBlock:
    """`fl_sim.runtime.grids.folding.Fold` of a weighted mean.

    Attributes:
        exchange: schema, and how uploads are encoded.
        equal: whether every client weighs the same; else its examples do.
    """

    exchange: Exchange
    equal: bool

    def begin(self, start: RecordDict) -> SummingBlock:
        """Begin a block."""
        schema, held, params = self.exchange.schema, None, Params()
        if START in start:
            arrays = cast(ArrayRecord, start[START])
            if "mask" in arrays:
                held = wire.unpack_mask(torch.frombuffer(bytearray(arrays["mask"].data), dtype=torch.uint8), schema)
            if "params" in arrays:
                params = schema.view(torch.frombuffer(bytearray(arrays["params"].data), dtype=torch.float32))
        return SummingBlock(self.exchange, self.equal, params, held)


@dataclass
class SummingBlock:
    """A block on a worker: replies are kept until the block's sums are smaller, and then added up one by one."""

    exchange: Exchange
    equal: bool
    start: Params
    held_mask: Mask | None
    replies: list[Message] = field(default_factory=list)
    receipts: list[Receipt | None] = field(default_factory=list)
    sums: Sums | None = None
    kept_bytes: int = 0
    is_sparse: bool = False
    clients: int = 0
    last: int | None = None

    def add(self, reply: Message) -> None:
        """Take the next client's reply."""
        self.replies.append(reply)
        self.receipts.append(None)
        if reply.has_error():
            return
        if self.sums is None:
            self.kept_bytes += wire.array_bytes(reply.content)
            self.is_sparse = self.is_sparse or self._has_mask(reply.content)
            schema = self.exchange.schema
            if self.kept_bytes < 8 * (schema.size + self.is_sparse * schema.prunable_size):
                return
            self.sums = Sums.zeros(schema)
        for place, each in enumerate(self.replies):
            if self.receipts[place] is None and not each.has_error():
                self.receipts[place] = self._folded(place, each)

    def finish(self) -> Sequence[Receipt | None]:
        """A receipt for each reply that was folded, and the sums in the last one whose update counts."""
        if self.sums is not None and self.last is not None:
            self.replies[self.last].content = content_of(self.sums, self.clients)
        return self.receipts

    def _has_mask(self, content: RecordDict) -> bool:
        """Whether an update is sent under a mask, so that sums need the weights that cover each coordinate."""
        try:
            payload = codecs.opened(wire.payload(content), schema=self.exchange.schema, held_mask=self.held_mask)
        except CorruptPayload:
            return False  # it is rejected when it is decoded
        return payload.described().mask_mode != "none"

    def _folded(self, place: int, reply: Message) -> Receipt:
        """Fold one reply, take its content out, and say what is booked of it."""
        assert self.sums is not None
        content, size = reply.content, protocol_bytes(reply, direction="up")
        reply.content = RecordDict()
        try:
            found = decoded(self.exchange, content, self.start, self.held_mask)
        except Rejected as problem:
            return Receipt(problem.described, size, rejected=str(problem))
        self.sums.add(found.update, 1.0 if self.equal else None)
        self.last, self.clients = place, self.clients + 1
        return Receipt(found.described, size, found.update.num_examples, found.update.metrics, found.chosen)


# -- sums as they travel -----------------------------------------------------------------------------------------------


def content_of(sums: Sums, clients: int) -> RecordDict:
    """Sums in memory, of so many updates, as a content."""
    arrays = {"prunable": _in_memory(sums.prunable), "others": _in_memory(sums.others), "squares": sums.squares.numpy()}
    if sums.covered is not None:
        arrays["covered"] = _in_memory(sums.covered)
    records: dict[str, object] = {name: _array(numbers) for name, numbers in arrays.items()}
    numbers = ConfigRecord({"weight": sums.weight, "clients": clients})
    return filled(RecordDict, {SUMS: filled(ArrayRecord, records), NUMBERS: numbers})


def summed(content: RecordDict, schema: Schema, block: int) -> Summed | None:
    """Invert `content_of`, for the sums of a block; None where a content has no sums."""
    if SUMS not in content:
        return None
    arrays = {name: np.frombuffer(array.data) for name, array in cast(ArrayRecord, content[SUMS]).items()}
    numbers = cast("Mapping[str, float]", content[NUMBERS])
    sums = Sums(
        schema,
        statistics(schema)[0],
        Accumulator.over(arrays["prunable"]),
        Accumulator.over(arrays["others"]),
        torch.from_numpy(arrays["squares"].copy()),
        Accumulator.over(arrays["covered"]) if "covered" in arrays else None,
        numbers["weight"],
    )
    return Summed(Params(), 1, block=block, sums=sums, clients=int(numbers["clients"]))


def _in_memory(numbers: Accumulator) -> NDArray[np.float64]:
    ((_, whole),) = numbers.pieces()
    return whole


def _array(numbers: NDArray[np.generic]) -> object:
    return array_of(cast(bytes, numbers.view(np.uint8).data), STYPE, dtype=str(numbers.dtype), shape=numbers.shape)
