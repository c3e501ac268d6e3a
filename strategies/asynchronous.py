"""Federations without rounds: FedBuff, FedAsync, and steps with a deadline, in virtual time (`[schedule]`).

The pieces are those of a round (encode a task, run clients, decode, fold), driven by a queue of events. A step of the server is
one line of rounds.jsonl. Where clients have models of several capacities, each model is a `Lane` and all share the queue: a step
folds the updates of each, and the models are coupled as after a round.

A client gets each version of the model at most once, so that its random numbers follow from (seed, version, client). With a
buffer as large as the cohort and `max_staleness = 0` a step is a round of FedAvg, bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial

from flwr.serverapp import Grid

from fl_sim.core.types import Mask, Params, Scalar, UserError
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.server_context import ServerContext
from strategies.federated_server import FederatedServer, no_progress
from strategies.flights import Flight, Flights, devices_of
from strategies.lanes import Lane, shares
from strategies.round_log import RoundFailed
from strategies.selection import uniform
from strategies.slots import Slots
from strategies.uplink_receiver import OnReply

log = logging.getLogger("fl_sim")


class AsyncServer:
    """The server of a run without rounds; `round` goes on to the next step.

    Attributes:
        lanes: the models of the federation, one for each capacity.
        flights: clients that are on their way.
        now: virtual time in seconds.
    """

    def __init__(self, slots: Slots, context: ServerContext, *others: ServerContext) -> None:
        _require_possible(slots, context)
        contexts, self.schedule = (context, *others), context.schedule
        self.flights, self.now = Flights(devices_of(context), context.availability), 0.0
        self.lanes = [
            Lane(slots, each, self.flights, concurrency=most, wanted=wanted, settle=self._settle)
            for each, most, wanted in zip(contexts, *self._shares(contexts), strict=True)
        ]
        self._federated = FederatedServer([lane.server for lane in self.lanes], slots.couple_models)
        for lane in self.lanes:
            lane.server.cohorts.away = partial(self._away, lane)
        self._deadline_s = context.accounting.network.deadline_s or math.inf
        chooses = slots.select is not uniform or slots.calibrate is not None
        self._asks = chooses or context.sampling.evaluate_size > 0
        self._grid: LocalGrid | None = None

    def _shares(self, contexts: Sequence[ServerContext]) -> tuple[list[int], Sequence[int | None]]:
        """Of each model: clients that train at a time, and its part of a buffer whose updates are all of one version."""
        cohorts = [each.sampling.cohort_size for each in contexts]
        concurrency = shares("schedule.concurrency", self.schedule.concurrency or sum(cohorts), cohorts)
        if self.schedule.max_staleness != 0 or self.schedule.wanted is None:
            return concurrency, [None] * len(cohorts)
        return concurrency, shares("schedule.max_staleness = 0: updates of a step", self.schedule.wanted, cohorts)

    @property
    def models(self) -> Sequence[Lane]:
        """The models of the federation."""
        return self.lanes

    @property
    def params(self) -> Params:
        """Global parameters of the first model."""
        return self._federated.params

    @property
    def mask(self) -> Mask | None:
        """Global mask of the first model, or None while it is dense."""
        return self._federated.mask

    @property
    def failures(self) -> Mapping[str, int]:
        """Failed client tasks so far, by kind."""
        return self._federated.failures

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last step: as of a round, with how stale its updates were and how many clients are on their way."""
        stale = [each for lane in self.lanes for each in lane.stale]
        ages = [age for age, _ in stale]
        told = {"staleness": sum(ages) / len(ages), "staleness_max": max(ages)} if ages else {}
        masks = {"stale_masks": sum(other for _, other in stale)}
        return {**self._federated.metrics, **told, **masks, "in_flight": len(self.flights)}

    # -- one step ------------------------------------------------------------------------------------------------------

    def round(self, grid: Grid, options: Mapping[str, Scalar], on_reply: OnReply = no_progress) -> None:
        """Go on to the next step: send tasks and take updates until it is due, then fold them.

        Raises:
            RoundFailed: too few usable updates, or nobody who could be sent a task.
        """
        if not isinstance(grid, LocalGrid):
            raise UserError(
                f"schedule.kind = {self.schedule.kind!r}: needs an engine of fl-sim; allowed here: 'rounds'"
            )
        self._grid, self.now = grid, self.lanes[0].server.receiver.simulated_s
        started, wanted = self.now, self.schedule.wanted
        for lane in self.lanes:
            lane.open(grid, options)
        self._wait_for_answers()
        self._fill()
        while not self._is_due(grid, started):
            flight = self.flights.next(grid)
            if flight is None:
                self._wait()
                continue
            self._end(flight, on_reply)
            if wanted is not None and self._buffered < wanted:
                self._fill()
        self._step(grid)

    @property
    def _buffered(self) -> int:
        return sum(len(lane.buffer) for lane in self.lanes)

    def _fill(self) -> None:
        for lane in self.lanes:
            lane.fill(self.now)

    def _next_start(self) -> float:
        """When a client is reachable that may be sent a task; infinity where none ever is."""
        return min((lane.next_start(self.now) for lane in self.lanes if lane.room() > 0), default=math.inf)

    def _is_due(self, grid: LocalGrid, started: float) -> bool:
        """Whether the buffer is full, or the deadline of a step that has updates is over; the clock is put there."""
        wanted, buffered = self.schedule.wanted, self._buffered
        if not buffered or (wanted is not None and buffered >= wanted):
            return buffered > 0
        flight = self.flights.next(grid)
        if flight is None:  # everybody answered; of a buffer that is not full that is all where nobody else can fill it
            return wanted is None or self._next_start() == math.inf
        deadline = started + self._deadline_s
        if wanted is not None or flight.ends_s <= deadline:
            return False
        self.now = max(self.now, deadline)
        return True

    def _wait(self) -> None:
        """Nobody is on the way: wait until somebody is reachable.

        Raises:
            RoundFailed: nobody ever is.
        """
        start = self._next_start()
        if start == math.inf:
            for lane in self.lanes:
                lane.require_no_failures()
            number = self.lanes[0].server.state.round + 1
            raise RoundFailed(f"round {number}: no client is reachable from {self.now:.0f} s on")
        self.now = max(self.now, start)
        self._fill()

    def _end(self, flight: Flight, on_reply: OnReply) -> None:
        """A client answered, or is gone: its update waits for the step, or it has failed."""
        self.now = max(self.now, flight.ends_s)
        self.flights.end(flight)
        lane = next(lane for lane in self.lanes if lane.owns(flight.client))
        if lane.end(flight):
            on_reply(self._buffered, self.schedule.wanted or sum(each.concurrency for each in self.lanes))

    def _step(self, grid: LocalGrid) -> None:
        """Fold what has arrived, model by model; then the models are coupled, and clients evaluate."""
        wanted, have = self.schedule.wanted, self._buffered
        if wanted is not None and have < wanted:
            number = self.lanes[0].server.state.round + 1
            log.warning(
                "round %d: a step of %d instead of %d updates: no other client can be sent a task", number, have, wanted
            )
        if self._asks:
            self._settle()  # one request to the clients at a time
        else:
            self.flights.start(grid)  # workers train while this process folds
        for lane in self.lanes:
            lane.server.receiver.simulated_s = self.now
            lane.step(grid)
        self._wait_for_answers()
        self._federated.couple()
        self._federated.evaluate(grid)

    def _wait_for_answers(self) -> None:
        """Put the clock where the last model has the answers to its measurement (`Query`), as one server waits for all."""
        self.now = max(lane.server.receiver.simulated_s for lane in self.lanes)
        for lane in self.lanes:
            lane.server.receiver.simulated_s = self.now

    def _settle(self) -> None:
        """Let the clients that were sent a task run now, which changes nothing of what they will have sent or when."""
        if self._grid is not None:
            self.flights.settle(self._grid)

    def _away(self, lane: Lane) -> frozenset[int]:
        return lane.away(self.now)


def _require_possible(slots: Slots, context: ServerContext) -> None:
    """Complain of what needs rounds. Raises UserError."""
    if slots.counts_cohorts:
        raise UserError(
            f"schedule.kind = {context.schedule.kind!r}: not with this strategy, whose guarantee is for cohorts drawn anew in "
            "each round; allowed: kind = 'rounds'"
        )
