"""Federations without rounds: FedBuff, FedAsync, and steps with a deadline, in virtual time (`[schedule]`).

The pieces are those of a round (encode a task, run clients, decode, fold), driven by a queue of events. A step of the server is
one line of rounds.jsonl. What makes it exact:

- Every task is remembered with the model and mask that it started from, so that a stale update is decoded, and its change
  taken, against its own base. It is booked in the step that uses it, its task in the step that sent it.
- A client gets each version of the model at most once, so that its random numbers follow from (seed, version, client).
- A step folds its updates in the order of (version, client): with a buffer as large as the cohort and `max_staleness = 0` a
  step is a round of FedAvg, bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

from flwr.app import MessageType
from flwr.serverapp import Grid

from fl_sim.core.types import Mask, Params, Scalar, Update, UserError
from fl_sim.runtime.grids.base import FIRST_NODE, LocalGrid
from fl_sim.runtime.server_context import ServerContext, ServerSnapshot
from strategies.flights import Flight, Flights, devices_of
from strategies.free_clients import FreeClients
from strategies.round_log import RoundFailed, Unusable, require_content
from strategies.selection import uniform
from strategies.server_step import ServerState
from strategies.slots import Slots, no_metrics
from strategies.sparse_server import SparseServer
from strategies.staleness import Refresh, same_mask
from strategies.uplink_receiver import OnReply

log = logging.getLogger("fl_sim")


def no_progress(answered: int, wanted: int) -> None:
    """Show nothing."""


class AsyncServer:
    """The server of a run without rounds; `round` goes on to the next step.

    Attributes:
        server: the server's side of the model.
        flights: clients that are on their way.
        now: virtual time in seconds.
    """

    def __init__(self, slots: Slots, context: ServerContext) -> None:
        _require_possible(slots, context)
        self.server, self.context, self.schedule = SparseServer(slots, context), context, context.schedule
        self.concurrency = self.schedule.concurrency or context.sampling.cohort_size
        self.refresh = Refresh(self.schedule, context.exchange.schema)
        self.flights, self.now = Flights(devices_of(context), context.availability), 0.0
        self._bases: dict[int, ServerState] = {}
        self._buffer: list[Flight] = []
        self._stale: list[tuple[int, bool]] = []
        self._grid: Grid | None = None

    @property
    def models(self) -> Sequence[Self]:
        """The one model."""
        return (self,)

    @property
    def params(self) -> Params:
        """Global parameters."""
        return self.server.params

    @property
    def mask(self) -> Mask | None:
        """Global mask, or None while the model is dense."""
        return self.server.mask

    @property
    def failures(self) -> Mapping[str, int]:
        """Failed client tasks so far, by kind."""
        return self.server.failures

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last step: as of a round, with how stale its updates were and how many clients are on their way."""
        ages = [age for age, _ in self._stale]
        told = {"staleness": sum(ages) / len(ages), "staleness_max": max(ages)} if ages else {}
        masks = {"stale_masks": sum(stale for _, stale in self._stale)}
        return {**self.server.metrics, "simulated_s": self.now, **told, **masks, "in_flight": len(self.flights)}

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
        self._grid, started = grid, self.now
        self._open(grid, options)
        self._fill()
        while not self._is_due(grid, started):
            flight = self.flights.next(grid)
            if flight is None:
                self._wait()
                continue
            self._end(flight, on_reply)
            if self.schedule.wanted is not None and len(self._buffer) < self.schedule.wanted:
                self._fill()
        self._step(grid)

    def _open(self, grid: Grid, options: Mapping[str, Scalar]) -> None:
        """Begin a version of the model: nobody has been given it yet."""
        task = self.server.begin(grid, options)
        self._nodes, number = self.server.cohorts.nodes(grid), self.server.state.round
        self._bases[number] = self.server.state
        self._encode = self.server.sender.encoder(task, MessageType.TRAIN)
        self._pool = FreeClients(
            self._nodes,
            self.flights.flying,
            seed=self.context.seed,
            number=number + 1,
            availability=self.context.availability,
        )

    def _fill(self) -> None:
        """Send this version to clients that are drawn, until as many train as may."""
        count, wanted = self.concurrency - len(self.flights), self.schedule.wanted
        if self.schedule.max_staleness == 0 and wanted is not None:
            count = min(count, wanted - len(self._buffer) - len(self.flights))
        drawn = self._pool.draw(count, self.now) if count > 0 else []
        if not drawn:
            return
        sent = self._encode([(client, self._nodes[client]) for client in drawn], self.server.round_log)
        sent.book()
        for client, message in zip(drawn, sent.messages, strict=True):
            size = self.server.round_log.down_bytes[client]
            self.flights.send(client, message, version=self.server.state.round, now=self.now, down_bytes=size)

    def _is_due(self, grid: Grid, started: float) -> bool:
        """Whether the buffer is full, or the deadline of a step that has updates is over; the clock is put there."""
        wanted = self.schedule.wanted
        if not self._buffer or (wanted is not None and len(self._buffer) >= wanted):
            return bool(self._buffer)
        flight = self.flights.next(grid)
        if (
            flight is None
        ):  # everybody answered; with a buffer that is not full, unless nobody else can fill it, that is not all
            return wanted is None or self._pool.next_start(self.now) == math.inf
        deadline = started + (self.context.accounting.network.deadline_s or math.inf)
        if wanted is not None or flight.ends_s <= deadline:
            return False
        self.now = max(self.now, deadline)
        return True

    def _wait(self) -> None:
        """Nobody is on the way: wait until somebody is reachable.

        Raises:
            RoundFailed: nobody ever is.
        """
        number, round_log, start = self.server.state.round + 1, self.server.round_log, self._pool.next_start(self.now)
        if start == math.inf:
            if round_log.failures:
                round_log.require_enough(number, len(round_log.failures), self.context.sampling.faults.max_share)
            raise RoundFailed(f"round {number}: no client is reachable from {self.now:.0f} s on")
        self.now = max(self.now, start)
        self._fill()

    def _end(self, flight: Flight, on_reply: OnReply) -> None:
        """A client answered, or is gone: its update waits for the step, or it has failed."""
        self.now, number = max(self.now, flight.ends_s), self.server.state.round + 1
        self.flights.end(flight)
        if flight.version < self.server.state.round:
            self._pool.back(flight.client)
        try:
            if flight.is_lost:
                gone = f"client {flight.client}: was not reachable any more when its update was ready"
                raise Unusable("lost", gone, is_fault=False)
            if self.server.receiver.drops(self._bases[flight.version], flight.client):
                raise Unusable("lost", f"client {flight.client}: dropped out of the simulated network", is_fault=False)
            assert flight.reply is not None
            require_content(flight.client, flight.reply)
            if self.schedule.is_too_old(self.server.state.round - flight.version):
                self._decoded(flight, is_late=True)
        except Unusable as problem:
            self.server.receiver.failed(number, flight.client, problem, self.server.round_log)
            faults, most = self.server.round_log.faults, self.concurrency + (self.schedule.wanted or 0)
            if faults > most:
                self.server.round_log.require_enough(number, faults, self.context.sampling.faults.max_share)
        else:
            self._buffer.append(flight)
            on_reply(len(self._buffer), self.schedule.wanted or self.concurrency)

    def _step(self, grid: Grid) -> None:
        """Fold what has arrived, and forget the models that nobody trains any more."""
        self._stale, wanted = [], self.schedule.wanted
        if wanted is not None and len(self._buffer) < wanted:
            number, have = self.server.state.round + 1, len(self._buffer)
            log.warning(
                "round %d: a step of %d instead of %d updates: no other client can be sent a task", number, have, wanted
            )
        self.server.receiver.simulated_s = self.now
        self.flights.start(grid)  # workers train while this process folds
        self.server.fold(grid, self.server.state, self._arriving(self.server.state))
        self._buffer = []
        used = {flight.version for flight in self.flights.flying.values()}
        self._bases = {version: base for version, base in self._bases.items() if version in used}

    def _arriving(self, current: ServerState) -> Iterator[Update]:
        """The buffered updates, decoded against their own bases and moved to the current model."""
        receiver, round_log, number = self.server.receiver, self.server.round_log, current.round + 1
        for flight in sorted(self._buffer, key=lambda flight: (flight.version, flight.client)):
            base, stale = self._bases[flight.version], current.round - flight.version
            try:
                update = self._decoded(flight, is_late=False)
            except Unusable as problem:
                receiver.failed(number, flight.client, problem, round_log)
                continue
            self.server.sender.received(flight.client, base.mask)
            self._stale.append((stale, not same_mask(base, current)))
            round_log.add(update.num_examples, update.metrics)
            yield self.refresh(update, base, current, stale)
        count = len(self._buffer) + len([each for each in round_log.failures if each.kind != "late"])
        round_log.require_enough(number, count, self.context.sampling.faults.max_share)

    def _decoded(self, flight: Flight, *, is_late: bool) -> Update:
        """Decode an update against the model that it started from, and book it in the step in progress. Raises Unusable."""
        assert flight.reply is not None
        return self.server.receiver.update(
            self._bases[flight.version],
            flight.client,
            flight.reply,
            self.server.round_log,
            number=self.server.state.round + 1,
            is_late=lambda described, samples: is_late,
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def saved(self) -> ServerSnapshot:
        """Take a snapshot of everything that the next step depends on, updates under way included."""
        flights = [] if self._grid is None else self.flights.saved(self._grid)
        used = {flight.version for flight in flights}
        bases = {version: (base.params, base.mask) for version, base in self._bases.items() if version in used}
        return replace(self.server.saved(), flights=flights, bases=bases, dispatched=self.flights.dispatched)

    def restore(self, saved: ServerSnapshot) -> None:
        """Go on after the step of a snapshot."""
        self.server.restore(saved)
        self.now, self._buffer = saved.simulated_s, []
        schema = self.context.exchange.schema
        self._bases = {
            number: ServerState(schema, params, number, mask) for number, (params, mask) in saved.bases.items()
        }
        self.flights.restore(saved.flights, saved.dispatched, lambda client: FIRST_NODE + client)


def _require_possible(slots: Slots, context: ServerContext) -> None:
    """Complain of what needs rounds. Raises UserError."""
    needs = {
        "extra tensors": bool(context.exchange.extra),
        "the strategy's selection of clients": slots.select is not uniform,
        "the strategy's calibration on clients": slots.calibrate is not None,
        "the strategy's accounting of rounds": slots.account is not no_metrics,
    }
    for name, given in needs.items():
        if given:
            raise UserError(f"schedule.kind = {context.schedule.kind!r}: not with {name}; allowed: kind = 'rounds'")
