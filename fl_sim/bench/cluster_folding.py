"""What clients cost whose updates a worker adds up: rounds on the worker of the short run, timed.

Such a client costs less than one whose update travels: it is decoded where it was made, in memory that the last one left.
"""

from __future__ import annotations

import math
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
from fl_sim.core.types import Scalar
from fl_sim.runtime.grids.folding import Foldable, HandedIn, Reply
from fl_sim.runtime.grids.ray import RayGrid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.round_hooks import client_options
from fl_sim.simulation.server import build_server

ROUNDS = 4
"""That are timed; the first one warms up."""


class FoldingCosts(NamedTuple):
    """Of clients whose updates are added up by workers; `fl_sim.bench.cluster_model.Costs` has the units."""

    sums_bytes: float = 0.0
    folded_s: float = 0.0
    receipt_s: float = 0.0
    add_s: float = 0.0


class _Outgoing(Protocol):
    messages: Sequence[Message]


class _Model(Protocol):
    """A model's server that knows whether workers may add up updates (`strategies.sparse_server.SparseServer`)."""

    exact_from: int

    def foldable(self, cohort: int) -> Foldable | None: ...

    def configure_train(self, grid: Grid, options: Mapping[str, Scalar]) -> _Outgoing: ...

    def aggregate_train(
        self, grid: Grid, sent: _Outgoing, replies: Iterable[Reply | HandedIn], on_reply: Callable[[int, int], None]
    ) -> None: ...


def of_folding(experiment: Experiment, federation: Federation, grid: RayGrid, sent: Ledger) -> FoldingCosts:
    """Time some rounds in which the worker adds up all updates.

    Args:
        experiment: whose cohort is what counts.
        federation: of the short run, of fewer clients a round.
        grid: with one worker.
        sent: what the short run sent.
    """
    schema, server = federation.first.exchange.schema, build_server(federation, Ledger())
    model = cast(_Model, server.models[0])
    if len(server.models) > 1 or model.foldable(experiment.cohort.size) is None:
        return FoldingCosts()
    model.exact_from = 1
    nnz = sent.total(by=("direction",), column="nnz", where={"phase": "train"})["up",]
    sparse = nnz < sent.messages(phase="train")["up"] * schema.prunable_size
    grid.clients_per_task = experiment.ray.clients_per_task
    timed = [_timed(model, grid, client_options(federation.experiment)) for _ in range(ROUNDS)][1:]
    each, receipt, add = (statistics.median(part) for part in zip(*timed, strict=True))
    return FoldingCosts(8.0 * (schema.size + sparse * schema.prunable_size), each, receipt, max(0.0, add))


@dataclass
class _Clock:
    """Notes the driver's seconds until the first reply is there, and at each of them."""

    taken_in: float = 0.0
    at: list[float] = field(default_factory=list)

    def watched(self, replies: Iterator[Reply | HandedIn]) -> Iterator[Reply | HandedIn]:
        began = time.thread_time()
        first = next(replies)
        self.taken_in = time.thread_time() - began
        yield first
        yield from replies

    def reply(self, answered: int, cohort: int) -> None:
        self.at.append(time.thread_time())


def _timed(model: _Model, grid: RayGrid, options: Mapping[str, Scalar]) -> tuple[float, float, float]:
    """Seconds of the worker for a client, of the driver for a client, and for the sum."""
    sent, clock = model.configure_train(grid, options), _Clock()
    spent, count = grid.costs.spent, len(sent.messages)
    foldable = model.foldable(count)
    assert foldable is not None
    always = foldable.fold(math.inf)
    replies = grid.send_and_fold(sent.messages, replace(foldable, fold=lambda _: always))
    model.aggregate_train(grid, sent, clock.watched(replies), clock.reply)
    *receipts, last = [after - at for at, after in pairwise(clock.at)] or [0.0]
    receipt = statistics.median(receipts or [0.0])
    return (grid.costs.spent - spent) / count, receipt + clock.taken_in / count, last - receipt
