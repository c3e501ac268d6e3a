"""Flower's Strategy hooks over the pure server step.

`SparseStrategy` runs under `strategy.start(grid, ...)` on any Grid: ours, Flower's simulation, a SuperLink. It samples
cohorts by partition from the seed (`cohorts`), encodes one payload per distinct mask a client holds (`sending`), decodes
the replies one at a time in partition order (`receiving`), and books every payload that moved (`books`). The method
itself is a `Method`: a composition of functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_sim import codecs
from fl_sim.codecs import Description
from fl_sim.communication import messages as wire
from fl_sim.core.seeding import Purpose
from fl_sim.core.types import Mask, MaskRule, Params, Scalar, Task
from fl_sim.runtime.server_context import ServerSnapshot, Setup
from fl_sim.sparsity.curves import Curves, MeasureCurves
from strategies.aggregation import mean, settled
from strategies.calibration import Calibrate
from strategies.capacities import Capacities
from strategies.cohorts import Cohort, Cohorts
from strategies.distillation import Teach, Unite, apart, untaught
from strategies.downlink import Downlink, as_configured
from strategies.queries import CurveQuery
from strategies.receiving import Receiver
from strategies.round_log import Failure, RoundFailed, RoundLog
from strategies.sending import Sender
from strategies.server_step import Aggregate, Optimise, ServerState, accept, masked, server_step

__all__ = ["Account", "Failure", "Method", "RoundFailed", "RoundLog", "SparseStrategy", "nothing"]
log = logging.getLogger("fl_sim")

Account = Callable[[int], Mapping[str, float]]
"""Rounds finished -> numbers of a method's own for the round's log, for instance the privacy spent."""


def nothing(rounds: int) -> Mapping[str, float]:
    """No numbers of its own."""
    return {}


@dataclass(frozen=True)
class Method:
    """What a server does with a round's updates, as a composition; `config` travels to the clients as scalars.

    `calibrate` makes the mask rule anew after each round, from measurements; it takes the place of `adjust_mask`.
    """

    aggregate: Aggregate = mean
    adjust_mask: MaskRule | None = None
    optimise: Optimise = accept
    teach: Teach = untaught
    unite: Unite = apart
    calibrate: Calibrate | None = None
    downlink: Downlink = as_configured
    account: Account = nothing
    config: Mapping[str, Scalar] = field(default_factory=dict)

    def strategy(self, setup: Setup, *others: Setup) -> SparseStrategy | Capacities:
        """The Flower strategy of one run of this method; `others` are the surroundings of the other capacities."""
        parts = [SparseStrategy(self, each) for each in (setup, *others)]
        return Capacities(parts, self.unite) if others else parts[0]


class SparseStrategy(Strategy):
    """Federated rounds with sparse, encoded, booked updates, under `method`, surrounded by `setup`."""

    def __init__(self, method: Method, setup: Setup) -> None:
        aggregate = settled(method.aggregate, error_feedback=setup.exchange.error_feedback)
        self.method, self.setup = replace(method, aggregate=aggregate), setup
        self.state = ServerState(setup.exchange.schema, setup.initial if setup.start is None else setup.start)
        self.cohorts = Cohorts(setup.seed, setup.members)
        self.sender = Sender(setup, method.downlink)
        self.receiver = Receiver(setup, self.cohorts, self.sender)
        self.round_log = RoundLog()
        self._cohort: Cohort = []
        self._evaluated: dict[str, float] = {}
        self._grid: Grid | None = None

    @property
    def params(self) -> Params:
        """Global parameters, in schema order."""
        return self.state.params

    @property
    def mask(self) -> Mask | None:
        """Global mask, or None while the model is dense."""
        return self.state.mask

    @property
    def failures(self) -> dict[str, int]:
        """Failed client tasks so far, by kind."""
        return self.receiver.failures

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last round: example-weighted training metrics, layers' shares sent, usable replies, failures."""
        means = {f"train_{name}": value for name, value in self.round_log.metrics.items()}
        means |= {f"clients_{name}": value for name, value in self._evaluated.items()}
        clock = {"simulated_s": self.receiver.simulated_s} if self.receiver.network is not None else {}
        sent = {f"sent/{name}": round(share, 4) for name, share in self.round_log.sent.items()}
        own = self.method.account(self.state.round)
        counts = {"clients": self.round_log.replies, "failures": len(self.round_log.failures)}
        return {**means, **clock, **sent, **own, **counts}

    @property
    def expected(self) -> list[int]:
        """Nodes of the current cohort, in the order of its messages."""
        return [node for _, node in self._cohort]

    @property
    def parts(self) -> list[SparseStrategy]:
        """The strategies of the models of this federation: there is one."""
        return [self]

    # -- what survives the process -------------------------------------------------------------------------------------

    def saved(self) -> ServerSnapshot:
        """What the next round depends on."""
        state, holdings, published = self.state, self.sender.holdings, self.sender.published
        return ServerSnapshot(
            state.round,
            state.params,
            state.mask,
            state.memory,
            holdings.known(),
            holdings.answered,
            self.receiver.simulated_s,
            dict(self.failures),
            {} if published is None else dict(published.kept()),
            {} if published is None else dict(published.holders),
        )

    def restore(self, saved: ServerSnapshot) -> None:
        """Go on where `saved` was taken."""
        self.state = ServerState(self.setup.exchange.schema, saved.params, saved.round, saved.mask, saved.memory)
        self.sender.restore(saved)
        self.receiver.restore(saved)

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._grid = grid
        self.round_log = RoundLog()
        if self.state.round == 0:
            self.state = masked(self.state, None, adjust_mask=self.method.adjust_mask, calibrate=self._calibrate)
        number = self.state.round + 1
        self._cohort = self._cohort_of(number)
        scalars = {
            **self.method.config,
            **{k: v for k, v in config.items() if isinstance(v, (bool, int, float, str, bytes))},
        }
        task = Task(number, self.state.params, self.state.mask, scalars)
        return self.sender.messages(task, self._cohort, MessageType.TRAIN, self.round_log)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.sender.sent()
        self._cohort_of(self.state.round + 2)  # drawn while clients train, not when they wait for the next round
        start = replace(self.state, params=self.sender.start(self.state.params))
        arriving = self.receiver.updates(start, self._cohort, replies, self.round_log)
        updates, refine = self.method.teach(self.setup, start, arriving)
        self.state = server_step(
            start,
            updates,
            aggregate=self.method.aggregate,
            adjust_mask=self.method.adjust_mask,
            calibrate=self._calibrate,
            optimise=self._optimise,
            refine=refine,
        )
        if not _finite(self.state):
            raise RoundFailed(
                f"round {self.state.round}: the aggregate overflows; strategy.clip bounds what clients can do"
            )
        return ArrayRecord(), MetricRecord({**self.round_log.metrics})

    def _cohort_of(self, number: int) -> Cohort:
        assert self._grid is not None
        return self.cohorts.cohort(self._grid, number, Purpose.COHORT, self.setup.cohort_size)

    @property
    def _calibrate(self) -> Callable[[ServerState], MaskRule] | None:
        """The method's measurement in this run; None where it has none."""
        return None if self.method.calibrate is None else partial(self.method.calibrate, self.setup, self.ask)

    def _optimise(self, start: ServerState, aggregated: Params) -> tuple[Params, Params]:
        """The method's step, from what the clients started from; what was not published is still to come."""
        params, memory = self.method.optimise(start, aggregated)
        return self.sender.with_owed(params, self.state.params), memory

    def ask(self, state: ServerState, measure: MeasureCurves, images: int) -> list[tuple[Curves, int]]:
        """Distortion curves of `state` from a cohort of clients on the Grid of the round; see `CurveQuery`."""
        assert self._grid is not None
        return CurveQuery(self._grid, self.sender, self.receiver, self.round_log)(state, measure, images)

    # -- evaluation on clients -----------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.setup.evaluate_size == 0:
            return []
        number = self.state.round
        self._cohort = self.cohorts.cohort(grid, number, Purpose.EVALUATION, self.setup.evaluate_size)
        task = Task(number, self.state.params, self.state.mask)
        return self.sender.messages(task, self._cohort, MessageType.EVALUATE, self.round_log)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        self.sender.sent()
        evaluated = RoundLog()
        for client, reply in self.cohorts.in_order(replies, self._cohort):
            if reply.has_error():
                log.warning("round %d: evaluation: %s", self.state.round, reply.error.reason)
                self.sender.forget(client)
                continue
            count, metrics = wire.read_metrics(reply.content)
            self.receiver.books.book("up", self.state.round, client, reply, Description.opaque(0), phase="evaluate")
            evaluated.add(count, metrics)
            self.sender.received(client, self.state.mask)
        self._evaluated = evaluated.metrics if evaluated.replies else {}
        return MetricRecord({**evaluated.metrics}) if evaluated.replies else None

    def summary(self) -> None:
        log.info("%s: %d clients a round", type(self).__name__, self.setup.cohort_size)


def _finite(state: ServerState) -> bool:
    """Whether all parameters are; in one pass where they are one buffer."""
    if state.schema.is_flat:
        return codecs.finite(state.schema.flat(state.params))
    return all(bool(torch.isfinite(value).all()) for value in state.params.values())
