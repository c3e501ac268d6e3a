"""The server's side of one model: the two halves of a round, before and after the clients train.

    sent = server.configure_train(grid, options)            # sample a cohort, encode
    replies = grid.send_and_receive(sent.messages)
    server.aggregate_train(grid, sent, replies, on_reply)   # book, decode, aggregate, prune

The algorithm is a composition of functions (`Slots`); what is sampled, encoded and booked is the same for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fl_sim import codecs
from fl_sim.codecs import Description, Opened
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import Mask, MaskRule, Params, Scalar, Task, Update
from fl_sim.runtime.client.kept_between_calls import RULE, Watch
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.grids.folding import Foldable, HandedIn, Reply
from fl_sim.runtime.server_context import ServerContext, ServerSnapshot
from strategies.aggregation import settled
from strategies.client_evaluation import distribution, measured
from strategies.cohorts import Cohort, Cohorts
from strategies.downlink_sender import DownlinkSender, Outgoing
from strategies.queries import Query
from strategies.remote_sums import foldable_in
from strategies.round_log import RoundFailed, RoundLog, Unusable
from strategies.selection import Request, drawn, uniform
from strategies.server_step import ServerState, masked, server_step
from strategies.slots import Slots, require_extra, require_nothing_beside_a_budget, require_whole_tensors
from strategies.uplink_receiver import OnReply, UplinkReceiver, none_ready

log = logging.getLogger("fl_sim")


class SparseServer:
    """Federated rounds of one model with sparse, encoded, booked updates.

    Attributes:
        slots: the algorithm.
        context: the run that it serves.
        state: global parameters, mask, and what the optimizer keeps.
        round_log: replies, metrics and failures of the last round.
        exact_from: clients of the smallest cohort whose updates are added up exactly, so that anybody may add up some. Those
            of smaller ones are added up in their order, in plain float64.
    """

    exact_from = 128

    def __init__(self, slots: Slots, context: ServerContext) -> None:
        aggregate = settled(slots.aggregate, error_feedback=context.exchange.error_feedback)
        self.slots, self.context = replace(slots, aggregate=aggregate), context
        schema, first = context.exchange.schema, context.initial if context.start is None else context.start
        # A copy: a rule may change the parameters in place, and clients of this process know `initial`.
        self.state = ServerState(schema, schema.copied(first), scratch=context.scratch)
        self.cohorts = Cohorts(context.seed, context.sampling.members, context.sampling.world)
        self.sender = DownlinkSender(context, slots.downlink)
        self.receiver = UplinkReceiver(context, self.cohorts, self.sender)
        self.round_log = RoundLog()
        self._broadcast: Opened | None = None
        self._evaluated: Mapping[str, float] = {}
        self._unevaluated = 0
        watched = (Watch.of(rule, role=RULE) for rule in (slots.aggregate, slots.adjust_mask) if rule is not None)
        self._watches = [watch for watch in watched if watch is not None]
        require_extra(self.slots, self.state, context)
        require_whole_tensors(self.slots, context)
        require_nothing_beside_a_budget(self.slots, context)

    @property
    def params(self) -> Params:
        """Global parameters, in schema order."""
        return self.state.params

    @property
    def mask(self) -> Mask | None:
        """Global mask, or None while the model is dense."""
        return self.state.mask

    @property
    def failures(self) -> Mapping[str, int]:
        """Failed client tasks so far, by kind."""
        return self.receiver.failures

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last round: example-weighted training metrics, layers' shares sent, usable replies, failures.

        `evaluation_failures` are clients that were to evaluate and did not; the column is there where there were any.
        """
        means = {f"train_{name}": value for name, value in self.round_log.metrics.items()}
        means |= {f"clients_{name}": value for name, value in self._evaluated.items()}
        clock = {"simulated_s": self.receiver.simulated_s} if self.receiver.network is not None else {}
        sent = {f"sent/{name}": round(share, 4) for name, share in self.round_log.sent.items()}
        own = self.slots.account(self.state.round)
        counts = {"clients": self.round_log.replies, "failures": len(self.round_log.failures)}
        failed = {"evaluation_failures": self._unevaluated} if self._unevaluated else {}
        return {**means, **clock, **sent, **own, **counts, **failed}

    def accept(self, params: Params) -> None:
        """Take these as the global parameters."""
        self.state = replace(self.state, params=params)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def saved(self) -> ServerSnapshot:
        """Take a snapshot of everything that the next round depends on."""
        state, client_masks, published = self.state, self.sender.client_masks, self.sender.published
        return ServerSnapshot(
            round=state.round,
            params=state.params,
            mask=state.mask,
            memory=state.memory,
            held_masks=client_masks.held_masks(),
            answered=client_masks.answered,
            simulated_s=self.receiver.simulated_s,
            failures=dict(self.failures),
            published={} if published is None else dict(published.kept()),
            client_versions={} if published is None else dict(published.client_versions),
            codec_state=self.sender.codec_state.tensors,
        )

    def restore(self, saved: ServerSnapshot) -> None:
        """Go on after the round of a snapshot."""
        params, mask, memory = saved.params, saved.mask, saved.memory
        self.state = replace(self.state, params=params, round=saved.round, mask=mask, memory=memory)
        self.sender.restore(saved)
        self.receiver.restore(saved)

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_train(self, grid: Grid, options: Mapping[str, Scalar]) -> Outgoing:
        """Sample the next round's cohort and encode its tasks; `options` travel in `task.config`."""
        task = self.begin(grid, options)
        sent = self.sender.outgoing(task, self._selected(grid, task.round), MessageType.TRAIN, self.round_log)
        self._broadcast = self.sender.standing_for(task, sent)
        if self._broadcast is not None:
            self.state = replace(self.state, params=self._broadcast.decoded()[0])
        return sent

    def begin(self, grid: Grid, options: Mapping[str, Scalar]) -> Task:
        """Begin the next round; returns its task. Before the first one the rule may prune the initial model."""
        self.round_log = RoundLog()
        if self.state.round == 0:
            self.state = masked(self.state, None, adjust_mask=self.slots.adjust_mask, calibrate=self._calibrate(grid))
        config = {**self.slots.config, **options}
        number, extra = self.state.round + 1, self.slots.send(self.state)
        return Task(number, self.state.params, self.state.mask, config, self.context.seed, extra)

    def foldable(self, cohort: int) -> Foldable | None:
        """What workers may fold in a round of so many clients, whose tasks are made; None where this server needs each update."""
        return foldable_in(self.slots, self.context, self._start(cohort))

    def _start(self, cohort: int) -> ServerState:
        """The state that this round's clients start from."""
        return replace(self.state, params=self.sender.start(self.state.params), exact=cohort >= self.exact_from)

    def aggregate_train(
        self, grid: Grid, sent: Outgoing, replies: Iterable[Reply | HandedIn], on_reply: OnReply
    ) -> None:
        """Book what was sent, decode the replies one at a time, aggregate them, prune.

        Raises:
            RoundFailed: too few usable updates, or the aggregate overflows.
        """
        sent.book()
        if self.slots.select is uniform:  # drawn while clients train, not when they wait for the next round
            self._selected(grid, self.state.round + 2)
        start = self._start(len(sent.cohort))
        try:
            ready = grid.ready if isinstance(grid, LocalGrid) else none_ready
            arriving = self.receiver.updates(start, sent.cohort, replies, self.round_log, on_reply, ready=ready)
            self.fold(grid, start, arriving)
        finally:
            broadcast, self._broadcast = self._broadcast, None
            if broadcast is not None and not broadcast.is_whole:
                raise RoundFailed(
                    f"round {start.round + 1}: something changed task.params in place, through .data or NumPy; clients of a "
                    "model of this size share them with the server: change a copy, value.clone()"
                )

    def fold(self, grid: Grid, start: ServerState, arriving: Iterable[Update]) -> None:
        """Aggregate updates of clients that started from `start`, and prune.

        Raises:
            RoundFailed: too few usable updates, or the aggregate overflows.
        """
        updates, refine = self.slots.distil(self.context, start, arriving)
        self.state = server_step(
            start,
            updates,
            aggregate=self.slots.aggregate,
            adjust_mask=self.slots.adjust_mask,
            calibrate=self._calibrate(grid),
            optimise=self._optimise,
            refine=refine,
            members=self.context.sampling.clients,
        )
        for watch in self._watches:
            if not watch.done and (said := watch.called()):
                log.warning("strategy: %s", said)
        if not _finite(self.state):
            raise RoundFailed(
                f"round {self.state.round}: the aggregate overflows; strategy.clip bounds what clients can do"
            )

    def skip(self, grid: Grid) -> None:
        """Finish a round in which no client of this model sent anything: the mask rule is asked as after every round."""
        zero = {name: torch.zeros_like(self.state.params[name]) for name in self.state.schema.prunable}
        state, rule = replace(self.state, round=self.state.round + 1), self.slots.adjust_mask
        self.state = masked(state, zero, adjust_mask=rule, calibrate=self._calibrate(grid))

    def _selected(self, grid: Grid, number: int) -> Cohort:
        """The clients that train in a round."""
        sampling, nodes = self.context.sampling, self.cohorts.nodes(grid)
        if self.slots.select is uniform:
            return self.cohorts.cohort(grid, number, Purpose.COHORT, sampling.cohort_size)
        clients = np.array(list(nodes), dtype=np.int64)
        rng = numpy_generator(self.context.seed, number, Purpose.COHORT)
        chosen = self.chosen(grid, number, clients, min(sampling.cohort_size, len(clients)), rng)
        return [(client, nodes[client]) for client in chosen]

    def chosen(
        self, grid: Grid, number: int, clients: NDArray[np.int64], count: int, rng: np.random.Generator
    ) -> list[int]:
        """Of these clients, those that the strategy's selection rule gives a task of round `number`, ascending."""
        known = self.context.sampling.sizes
        sizes = np.array([known[client] for client in clients] if known else [0] * len(clients))
        query = Query(grid, self.receiver, self.round_log)
        return drawn(self.slots.select, Request(number, clients, sizes, count, rng, partial(query.losses, self.state)))

    def _calibrate(self, grid: Grid) -> Callable[[ServerState], MaskRule] | None:
        """The algorithm's measurement in this round; None where it has none."""
        if self.slots.calibrate is None:
            return None
        return partial(self.slots.calibrate, self.context, Query(grid, self.receiver, self.round_log))

    def _optimise(self, start: ServerState, aggregated: Params) -> tuple[Params, Params]:
        """The server optimizer's step from what the clients started from, with the residual of a sparse broadcast."""
        params, memory = self.slots.optimise(start, aggregated)
        return self.sender.with_residual(params, self.state.params), memory

    # -- evaluation on clients -----------------------------------------------------------------------------------------

    def configure_evaluate(self, grid: Grid) -> Outgoing:
        """Sample clients and encode the new model for them; nothing where no client evaluates."""
        size, number = self.context.sampling.evaluate_size, self.state.round
        cohort = self.cohorts.cohort(grid, number, Purpose.EVALUATION, size) if size else []
        task = Task(number, self.state.params, self.state.mask, seed=self.context.seed)
        return self.sender.outgoing(task, cohort, MessageType.EVALUATE, self.round_log) if size else Outgoing([], [])

    def aggregate_evaluate(self, sent: Outgoing, replies: Iterable[Message]) -> Mapping[str, float]:
        """Book what was sent, and average the clients' metrics; of their metrics the distribution too, a client counting once.

        Raises:
            RoundFailed, UserError: none of the clients answered; see `RoundLog.require_any`.
        """
        sent.book()
        evaluated, each, number = RoundLog(), list[Mapping[str, float]](), self.state.round
        for client, reply in self.cohorts.in_order(replies, sent.cohort):
            try:
                count, metrics = measured(client, reply)
            except Unusable as problem:
                log.warning("round %d: evaluation: %s", number, problem)
                self.sender.forget(client)
                evaluated.failed(client, problem)
                continue
            self.receiver.booking.book("up", number, client, reply, Description.opaque(0), phase="evaluate")
            evaluated.add(count, metrics)
            each.append(metrics)
            self.sender.received(client, self.state.mask)
        if sent.cohort:
            evaluated.require_any(number, len(sent.cohort), "evaluated the model")
        self._unevaluated = len(sent.cohort) - evaluated.replies
        self._evaluated = {**evaluated.metrics, **distribution(each)}
        return self._evaluated


def _finite(state: ServerState) -> bool:
    """Whether all parameters are finite; in one pass where they are one buffer."""
    if state.schema.is_flat:
        return codecs.finite(state.schema.flat(state.params))
    return all(bool(torch.isfinite(value).all()) for value in state.params.values())
