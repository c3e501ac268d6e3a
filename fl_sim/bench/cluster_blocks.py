"""What a block of clients costs whose updates a worker adds up: rounds of one block on the worker of the short run, timed.

In a block a client costs less than one after the other in tasks of their own: its update is decoded where it was made, in memory
that the last one left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple, Protocol, cast

from flwr.app import Message
from flwr.serverapp import Grid

from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.core.lookup import imported
from fl_sim.core.types import Scalar
from fl_sim.runtime.grids.folding import Blocks, Reply
from fl_sim.runtime.grids.pool import CLIENTS
from fl_sim.runtime.grids.ray import RayGrid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.round_hooks import client_options
from fl_sim.simulation.server import build_server

ROUNDS = 4
"""Of one block each; the first one warms up."""


class BlockCosts(NamedTuple):
    """Of a block in a round of the experiment's cohort; `fl_sim.bench.cluster_model.Costs` has the units."""

    block: int
    sums_bytes: float
    folded_s: float
    receipt_s: float
    add_s: float


class _Outgoing(Protocol):
    messages: Sequence[Message]


class _Model(Protocol):
    """A model's server that knows whether workers may add up updates (`strategies.sparse_server.SparseServer`)."""

    def foldable(self, cohort: int) -> Blocks | None: ...

    def configure_train(self, grid: Grid, options: Mapping[str, Scalar]) -> _Outgoing: ...

    def aggregate_train(
        self, grid: Grid, sent: _Outgoing, replies: Iterable[Reply], on_reply: Callable[[int, int], None]
    ) -> None: ...


def of_a_block(
    experiment: Experiment,
    federation: Federation,
    grid: RayGrid,
    sent: Ledger,
    *,
    fit_s: float,
    fold_s: float,
) -> BlockCosts:
    """Time some rounds whose cohort is one block.

    Args:
        experiment: whose cohort is cut into blocks.
        federation: of the short run, of fewer clients a round.
        grid: with one worker.
        sent: what the short run sent.
        fit_s, fold_s: for a client, and for its reply, where they are not in a block.
    """
    schema, cohort = federation.first.exchange.schema, experiment.cohort.size
    block = cast("Callable[[int], int]", imported("", "strategies.blocks:block_size"))(cohort)
    server = build_server(federation, Ledger())
    model = cast(_Model, server.models[0])
    longest = experiment.ray.clients_per_task or (block if experiment.faults.timeout_s is None else CLIENTS)
    if len(server.models) > 1 or block > longest or model.foldable(cohort) is None:
        return BlockCosts(block, 0.0, 0.0, 0.0, 0.0)
    nnz = sent.total(by=("direction",), column="nnz", where={"phase": "train"})["up",]
    sparse = nnz < sent.messages(phase="train")["up"] * schema.prunable_size
    nbytes = 8.0 * (schema.size + sparse * schema.prunable_size)
    grid.clients_per_task = None
    timed = [_timed(model, grid, cohort, client_options(federation.experiment)) for _ in range(ROUNDS)][1:]
    if not all(timed):  # so few uploads are smaller than their sum
        return BlockCosts(block, nbytes, fit_s + fold_s, fold_s, fold_s)
    each, receipt, add = (statistics.median(part) for part in zip(*filter(None, timed), strict=True))
    return BlockCosts(block, nbytes, each, receipt, max(0.0, add))


@dataclass
class _Clock:
    """Notes the driver's seconds until a block's replies are there, and at each of them."""

    taken_in: float = 0.0
    at: list[float] = field(default_factory=list)

    def watched(self, replies: Iterator[Reply]) -> Iterator[Reply]:
        began = time.thread_time()
        first = next(replies)
        self.taken_in = time.thread_time() - began
        yield first
        yield from replies

    def reply(self, answered: int, cohort: int) -> None:
        self.at.append(time.thread_time())


def _timed(
    model: _Model, grid: RayGrid, cohort: int, options: Mapping[str, Scalar]
) -> tuple[float, float, float] | None:
    """Seconds of the worker for a client, of the driver for a client and for the sums; None where updates came one by one."""
    sent, blocks, clock = model.configure_train(grid, options), model.foldable(cohort), _Clock()
    assert blocks is not None
    folded, spent, count = grid.traffic.folded, grid.costs.spent, len(sent.messages)
    replies = grid.send_and_fold(sent.messages, replace(blocks, places=[range(count)]))
    model.aggregate_train(grid, sent, clock.watched(replies), clock.reply)
    if grid.traffic.folded == folded:
        return None
    *receipts, last = [after - at for at, after in pairwise(clock.at)] or [0.0]
    receipt = statistics.median(receipts or [0.0])
    return (grid.costs.spent - spent) / count, receipt + clock.taken_in / count, last - receipt
