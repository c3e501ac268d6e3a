"""One model of a federation without rounds: the versions that its clients start from, and the updates that wait for a step.

What makes it exact:

- Every version that a client on its way started from is remembered with its mask: a stale update is decoded, and its change
  taken, against its own base. Under a sparse broadcast a version is what was published.
- What a client holds is noted when its update arrives, by the version of its own task, and not by that of the server.
- A step folds its updates in the order of (version, client).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from flwr.app import MessageType
from flwr.serverapp import Grid

from fl_sim.core.types import Mask, Params, Scalar, Update, UserError
from fl_sim.runtime.grids.base import FIRST_NODE
from fl_sim.runtime.server_context import ServerContext, ServerSnapshot
from strategies.flights import Flight, Flights
from strategies.free_clients import FreeClients
from strategies.round_log import Unusable, require_content
from strategies.selection import uniform
from strategies.server_step import ServerState
from strategies.slots import Slots
from strategies.sparse_server import SparseServer
from strategies.staleness import Refresh, clip_of, same_mask


class Lane:
    """One model, its clients, and their updates of the step in progress.

    Attributes:
        server: the server's side of the model.
        concurrency: clients that train at a time.
        wanted: updates of a step, where none may be stale; None = no matter whose they are.
        buffer: flights that have landed and wait for the step.
        stale: of each update of the last step, how many versions old it was, and whether its mask was another.
    """

    def __init__(
        self,
        slots: Slots,
        context: ServerContext,
        flights: Flights,
        *,
        concurrency: int,
        wanted: int | None,
        settle: Callable[[], None],
    ) -> None:
        self.server, self.context, self.schedule = SparseServer(slots, context), context, context.schedule
        self.concurrency, self.wanted, self._flights, self._settle = concurrency, wanted, flights, settle
        self._refresh = Refresh(self.schedule, context.exchange.schema, clip_of(slots.aggregate))
        self._bases: dict[int, ServerState] = {}
        self.buffer: list[Flight] = []
        self.stale: list[tuple[int, bool]] = []
        self._under_way = self._faults = 0
        members = context.sampling.members
        self._members = members if members is None or isinstance(members, range) else frozenset(members)

    @property
    def params(self) -> Params:
        """Global parameters."""
        return self.server.params

    @property
    def mask(self) -> Mask | None:
        """Global mask, or None while the model is dense."""
        return self.server.mask

    @property
    def _version(self) -> int:
        return self.server.state.round

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def open(self, grid: Grid, options: Mapping[str, Scalar]) -> None:
        """Begin a version of the model: nobody has been given it yet."""
        server = self.server
        self._nodes = server.cohorts.nodes(grid)
        task, number = server.begin(grid, options), server.state.round
        self._encode = server.sender.encoder(task, MessageType.TRAIN)
        self._bases[number] = replace(server.state, params=server.sender.start(server.state.params))
        self._pool = FreeClients(
            server.cohorts.everybody(grid),
            self._flights.flying,
            seed=self.context.seed,
            number=number + 1,
            availability=self.context.availability,
            choose=None if server.slots.select is uniform else partial(server.chosen, grid, number + 1),
        )

    def room(self) -> int:
        """Tasks that may be sent now."""
        count = self.concurrency - self._under_way
        return count if self.wanted is None else min(count, self.wanted - len(self.buffer) - self._under_way)

    def next_start(self, now: float) -> float:
        """When a client that may be sent a task is reachable; infinity where none ever is."""
        return self._pool.next_start(now)

    def away(self, now: float) -> frozenset[int]:
        """Clients that cannot be asked anything now: on their way, or not reachable."""
        reachable = self.context.availability
        gone = () if reachable is None else (c for c in self._nodes if reachable.until(c, now) is None)
        return frozenset((*self._flights.flying, *gone))

    def fill(self, now: float) -> None:
        """Send this version to clients that are drawn, until as many train as may."""
        count = self.room()
        if count <= 0:
            return
        if self.server.slots.select is not uniform:
            self._settle()  # a rule may ask clients before it chooses
        before = self.server.receiver.simulated_s
        drawn = self._pool.draw(count, now)
        # Tasks are sent when the answers are there; others train meanwhile.
        now += self.server.receiver.simulated_s - before
        if not drawn:
            return
        log, sender = self.server.round_log, self.server.sender
        sent = self._encode([(client, self._nodes[client]) for client in drawn], log)
        sent.book()
        self._under_way += len(drawn)
        for client, message in zip(drawn, sent.messages, strict=True):
            size = log.down_bytes[client]
            self._flights.send(client, message, version=self._version, holds=sender.version, now=now, down_bytes=size)

    # -- updates -------------------------------------------------------------------------------------------------------

    def end(self, flight: Flight) -> bool:
        """A client answered, or is gone. Returns whether its update waits for the step; else it has failed.

        Raises:
            RoundFailed: nothing but failures.
        """
        self._under_way -= 1
        if flight.version < self._version:
            self._pool.back(flight.client)
        number, log, receiver = self._version + 1, self.server.round_log, self.server.receiver
        try:
            self._answered(flight)
        except Unusable as problem:
            receiver.failed(number, flight.client, problem, log)
            self._faults += problem.is_fault
            most = self.concurrency + (self.schedule.wanted or 0)
            if max(self._faults, log.faults) > most:
                log.require_enough(number, log.faults, self.context.sampling.faults.max_share)
            return False
        self._faults = 0
        self.server.sender.received(flight.client, self._bases[flight.version].mask, flight.holds)
        self.buffer.append(flight)
        return True

    def require_no_failures(self) -> None:
        """Complain of clients that failed, where nobody else can be sent a task. Raises RoundFailed, UserError."""
        log = self.server.round_log
        if log.failures:
            log.require_enough(self._version + 1, len(log.failures), self.context.sampling.faults.max_share)

    def _answered(self, flight: Flight) -> None:
        """Raises Unusable where there is no update, or none that may be used."""
        if flight.is_lost:
            gone = f"client {flight.client}: was not reachable any more when its update was ready"
            raise Unusable("lost", gone, is_fault=False)
        if self.server.receiver.drops(self._bases[flight.version], flight.client):
            raise Unusable("lost", f"client {flight.client}: dropped out of the simulated network", is_fault=False)
        assert flight.reply is not None
        require_content(flight.client, flight.reply)
        if self.schedule.is_too_old(self._version - flight.version):
            self._decoded(flight, is_late=True)

    def step(self, grid: Grid) -> None:
        """Fold what has arrived, and forget the versions that nobody trains any more.

        Raises:
            RoundFailed: too few usable updates, or the aggregate overflows.
        """
        self.stale = []
        if self.buffer:
            current = self._bases[self._version]
            self.server.fold(grid, current, self._arriving(current))
        else:
            self.server.skip(grid)
        self.buffer = []
        used = {flight.version for flight in self._mine()}
        self._bases = {version: base for version, base in self._bases.items() if version in used}

    def owns(self, client: int) -> bool:
        """Whether this client trains this model."""
        return self._members is None or client in self._members

    def _mine(self) -> list[Flight]:
        return [flight for client, flight in self._flights.flying.items() if self.owns(client)]

    def _arriving(self, current: ServerState) -> Iterator[Update]:
        """The buffered updates, decoded against their own bases and moved to the current model."""
        receiver, log, number = self.server.receiver, self.server.round_log, current.round + 1
        for flight in sorted(self.buffer, key=lambda flight: (flight.version, flight.client)):
            base, stale = self._bases[flight.version], current.round - flight.version
            try:
                update = self._decoded(flight, is_late=False)
            except Unusable as problem:
                receiver.failed(number, flight.client, problem, log)
                continue
            self.stale.append((stale, not same_mask(base, current)))
            log.add(update.num_examples, update.metrics)
            yield self._refresh(update, base, current, stale)
        count = len(self.buffer) + len([each for each in log.failures if each.kind != "late"])
        log.require_enough(number, count, self.context.sampling.faults.max_share)

    def _decoded(self, flight: Flight, *, is_late: bool) -> Update:
        """Decode an update against the model that it started from, and book it in the step in progress. Raises Unusable."""
        assert flight.reply is not None
        return self.server.receiver.update(
            self._bases[flight.version],
            flight.client,
            flight.reply,
            self.server.round_log,
            number=self._version + 1,
            is_late=lambda described, samples: is_late,
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def saved(self) -> ServerSnapshot:
        """Take a snapshot of everything that the next step depends on, updates under way included."""
        self._settle()
        flights = [flight for flight in self._flights.saved() if self.owns(flight.client)]
        used = {flight.version for flight in flights}
        bases = {version: (base.params, base.mask) for version, base in self._bases.items() if version in used}
        return replace(self.server.saved(), flights=flights, bases=bases, dispatched=self._flights.dispatched)

    def restore(self, saved: ServerSnapshot) -> None:
        """Go on after the step of a snapshot."""
        self.server.restore(saved)
        self.buffer, schema = [], self.context.exchange.schema
        self._bases = {
            number: ServerState(schema, params, number, mask) for number, (params, mask) in saved.bases.items()
        }
        self._flights.restore(saved.flights, saved.dispatched, lambda client: FIRST_NODE + client, self.owns)
        self._under_way = len(saved.flights)


def shares(what: str, total: int, sizes: Sequence[int]) -> list[int]:
    """`total` cut for models in proportion to `sizes`, at least 1 each; `sizes` themselves where that is their sum.

    Raises:
        UserError: fewer than models; `what` starts the line.
    """
    if total < len(sizes):
        raise UserError(f"{what} = {total}: there are {len(sizes)} models (capacities); needed: at least 1 of each")
    left, weights = total - len(sizes), [size - 1 for size in sizes]
    weights = weights if sum(weights) else [1] * len(sizes)
    exact = [left * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    most = sorted(range(len(sizes)), key=lambda n: (parts[n] - exact[n], n))
    return [1 + part + (n in most[: left - sum(parts)]) for n, part in enumerate(parts)]
