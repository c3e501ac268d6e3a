"""Updates that workers add up: what they need for that, and the sums as they travel.

    foldable = foldable_in(slots, context, start)                     # None: the server needs single updates
    replies = grid.send_and_fold(messages, foldable)                  # receipts, and a sum of each worker or machine

A worker decodes and checks each reply as the server does. It folds replies where those that it will have in the round are larger
than its sum; else they travel as they are. Sums are exact (`strategies.exact_sums`), so that it does not matter who adds up what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from fl_sim.runtime.grids.folding import Fold, Foldable, Receipt
from fl_sim.runtime.server_context import ServerContext
from strategies.accumulators import Accumulator
from strategies.aggregation import weights_of_sums
from strategies.decoding import Rejected, decoded
from strategies.distillation import no_distillation
from strategies.exact_sums import ExactSum
from strategies.server_step import ServerState
from strategies.slots import Slots
from strategies.sums import Summed, Sums, statistics

SUMS, NUMBERS, START = "sums", "numbers", "start"
TOTALS = ("prunable", "others", "squares")
STYPE = "fl_sim.sums/2"


def foldable_in(slots: Slots, context: ServerContext, start: ServerState) -> Foldable | None:
    """What workers may fold in a round whose clients start from this state; None where the server needs each update.

    It does where the aggregation rule is none of `strategies.aggregation.LINEAR`, for distillation, extra tensors, recorded masks
    or payloads, simulated links, and a codec of the user's own. The updates of a small cohort are added up in their order.
    """
    weights, exchange, accounting = weights_of_sums(slots.aggregate), context.exchange, context.accounting
    if weights is None or not start.exact or slots.distil is not no_distillation:
        return None
    if exchange.extra.up or isinstance(exchange.uplink, OwnCoding):
        return None
    if accounting.recorder is not None or accounting.payloads is not None:
        return None
    if accounting.network.links or context.devices is not None:
        return None
    schema = exchange.schema
    sums = SumsOfWorkers(Exchange(schema, uplink=exchange.uplink), equal=weights == "equal")
    return Foldable(sums.fold, _start(sums.exchange, start), 8 * schema.size)


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
class SumsOfWorkers:
    """How workers fold the replies of a round, for a weighted mean.

    Attributes:
        exchange: schema, and how uploads are encoded.
        equal: whether every client weighs the same; else its examples do.
    """

    exchange: Exchange
    equal: bool

    def fold(self, clients: float) -> Fold:
        """`fl_sim.runtime.grids.folding.Foldable.fold`: for a worker that has about so many clients."""
        return partial(self.begun, clients)

    def begun(self, clients: float, start: RecordDict) -> RunningSum:
        """A worker's folding."""
        schema, held, params = self.exchange.schema, None, Params()
        if START in start:
            arrays = cast(ArrayRecord, start[START])
            if "mask" in arrays:
                held = wire.unpack_mask(torch.frombuffer(bytearray(arrays["mask"].data), dtype=torch.uint8), schema)
            if "params" in arrays:
                params = schema.view(torch.frombuffer(bytearray(arrays["params"].data), dtype=torch.float32))
        return RunningSum(self.exchange, self.equal, params, held, clients)


@dataclass
class RunningSum:
    """What a worker adds up in a round (`fl_sim.runtime.grids.folding.Folding`).

    The first replies of a task are kept until it is clear whether those of the round are larger than the sum.
    """

    exchange: Exchange
    equal: bool
    start: Params
    held_mask: Mask | None
    expected: float
    replies: list[Message] = field(default_factory=list)
    receipts: list[Receipt | None] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    is_sparse: bool = False
    sums: Sums | None = None
    clients: int = 0

    def begin(self) -> None:
        """Begin a task."""
        self.replies, self.receipts, self.sizes = [], [], []

    def add(self, reply: Message, *, must: bool) -> None:
        """Take the next client's reply."""
        self.replies.append(reply)
        self.receipts.append(None)
        if reply.has_error() or (self.sums is None and not must and not self._is_worthwhile(reply.content)):
            return
        if self.sums is None:
            self.sums = Sums.zeros(self.exchange.schema, exact=True)
        for place, each in enumerate(self.replies):
            if self.receipts[place] is None and not each.has_error():
                self.receipts[place] = self._folded(each, self.sums)

    def finish(self) -> Sequence[Receipt | None]:
        """A receipt for each reply that was folded."""
        self.replies, receipts = [], self.receipts
        return receipts

    def hand_in(self, others: Sequence[RecordDict]) -> RecordDict:
        """The sums of what was folded, with those of others; empty where nothing was."""
        schema, sums, clients = self.exchange.schema, self.sums, self.clients
        self.sums, self.clients = None, 0
        for other in map(partial(summed, schema=schema), others):
            if other is not None:
                sums = Sums.zeros(schema, exact=True) if sums is None else sums
                sums.merge(other.sums)
                clients += other.clients
        return RecordDict() if sums is None else content_of(sums, clients)

    def _is_worthwhile(self, content: RecordDict) -> bool:
        """Whether as many replies as this worker will have, of the size of those of the task so far, are larger than the sum."""
        self.sizes.append(wire.array_bytes(content))
        self.is_sparse = self.is_sparse or self._has_mask(content)
        schema, mean = self.exchange.schema, sum(self.sizes) / len(self.sizes)
        return self.expected * mean >= 8 * (schema.size + self.is_sparse * schema.prunable_size)

    def _has_mask(self, content: RecordDict) -> bool:
        """Whether an update is sent under a mask, so that sums need the weights that cover each coordinate."""
        try:
            payload = codecs.opened(wire.payload(content), schema=self.exchange.schema, held_mask=self.held_mask)
        except CorruptPayload:
            return False  # it is rejected when it is decoded
        return payload.described().mask_mode != "none"

    def _folded(self, reply: Message, sums: Sums) -> Receipt:
        """Fold one reply, take its content out, and say what is booked of it."""
        content, size = reply.content, protocol_bytes(reply, direction="up")
        reply.content = RecordDict()
        try:
            found = decoded(self.exchange, content, self.start, self.held_mask)
        except Rejected as problem:
            return Receipt(problem.described, size, rejected=str(problem))
        sums.add(found.update, 1.0 if self.equal else None)
        self.clients += 1
        return Receipt(found.described, size, found.update.num_examples, found.update.metrics, found.chosen)


# -- sums as they travel -----------------------------------------------------------------------------------------------


def content_of(sums: Sums, clients: int) -> RecordDict:
    """Exact sums in memory, of so many updates, as a content."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, total in zip(TOTALS, sums.totals, strict=True):
        assert isinstance(total, ExactSum)
        arrays |= _levels(name, total)
    if sums.covered is not None:
        arrays["covered"] = _in_memory(sums.covered)
    records: dict[str, object] = {name: _array(numbers) for name, numbers in arrays.items()}
    numbers = ConfigRecord({"weight": sums.weight, "clients": clients})
    return filled(RecordDict, {SUMS: filled(ArrayRecord, records), NUMBERS: numbers})


def summed(content: RecordDict, schema: Schema) -> Summed | None:
    """Invert `content_of`; None where a content has no sums. They may be read, and not changed."""
    if SUMS not in content:
        return None
    arrays = {n: np.frombuffer(a.data, dtype=a.dtype) for n, a in cast(ArrayRecord, content[SUMS]).items()}
    numbers = cast("Mapping[str, float]", content[NUMBERS])
    prunable, others, squares = (_from_levels(name, arrays) for name in TOTALS)
    covered = Accumulator.over(arrays["covered"]) if "covered" in arrays else None
    sums = Sums(schema, statistics(schema)[0], prunable, others, squares, covered, numbers["weight"])
    return Summed(Params(), 1, sums=sums, clients=int(numbers["clients"]))


def _levels(name: str, total: ExactSum) -> dict[str, NDArray[np.generic]]:
    """The levels of a sum by name. Those below the first are zero nearly everywhere: then places and numbers are given."""
    first, *more = map(_in_memory, total.levels)
    arrays: dict[str, NDArray[np.generic]] = {name: first}
    for level, numbers in enumerate(more, start=1):
        places = np.flatnonzero(numbers)
        if 2 * len(places) < len(numbers):
            arrays[f"{name}.{level}.places"], numbers = places, numbers[places]
        arrays[f"{name}.{level}"] = numbers
    return arrays


def _from_levels(name: str, arrays: Mapping[str, NDArray[np.generic]]) -> ExactSum:
    """Invert `_levels`."""
    levels = [cast("NDArray[np.float64]", arrays[name])]
    while (key := f"{name}.{len(levels)}") in arrays:
        numbers = cast("NDArray[np.float64]", arrays[key])
        if (places := arrays.get(f"{key}.places")) is not None:
            whole = np.zeros(len(levels[0]))
            whole[places] = numbers
            numbers = whole
        levels.append(numbers)
    return ExactSum([Accumulator.over(level) for level in levels])


def _in_memory(numbers: Accumulator) -> NDArray[np.float64]:
    ((_, whole),) = numbers.pieces()
    return whole


def _array(numbers: NDArray[np.generic]) -> object:
    return array_of(cast(bytes, numbers.view(np.uint8).data), STYPE, dtype=str(numbers.dtype), shape=numbers.shape)
