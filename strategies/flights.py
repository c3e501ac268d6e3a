"""Clients that train while the server goes on: the queue of their updates in virtual time.

A client runs when its result is needed, together with all others that were sent a task by then; where clients run beside this
process, earlier. When its update arrives follows from sizes, link, speed and samples alone, so that the order of events
depends on no engine and no batch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from flwr.app import Message

from fl_sim.communication.traces import Availability, Device
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.server_context import FlightSnapshot, ServerContext
from strategies.flight_messages import packed, unpacked, work

AHEAD = 64
"""Clients that are handed to workers at once, before a result of theirs is needed: they train while this process goes on."""


@dataclass(eq=False)
class Flight:
    """A client on its way: its task was sent, its update has not arrived.

    Attributes:
        client: its number.
        version: rounds finished when its task was sent.
        order: number of the task among all tasks.
        sent_s: virtual time at which the task was sent.
        down_bytes: payload bytes of the task.
        holds: version of the published model that the task brings, under a sparse broadcast.
        leaves_s: when the client stops being reachable.
        message: the task; None once the client has run.
        message_id: of the task, as the Grid numbered it.
        reply: what the client answered; None until it has run.
        arrives_s: when the answer arrives; until the client has run, the earliest time possible.
    """

    client: int
    version: int
    order: int
    sent_s: float
    down_bytes: int
    holds: int
    leaves_s: float
    message: Message | None = None
    message_id: str = ""
    reply: Message | None = None
    arrives_s: float = 0.0

    @property
    def ends_s(self) -> float:
        """When the server hears of it: its update arrives, or the client is gone."""
        return min(self.arrives_s, self.leaves_s)

    @property
    def is_lost(self) -> bool:
        """Whether the client is gone before its update has arrived."""
        return self.arrives_s > self.leaves_s


@dataclass
class Flights:
    """The queue of all flights by the time at which they end; equal times in the order of their tasks.

    Attributes:
        device: client -> its link and speed.
        availability: when clients are reachable; None = always.
        dispatched: tasks sent so far.
        flying: client -> its flight.
    """

    device: Callable[[int], Device]
    availability: Availability | None
    dispatched: int = 0
    flying: dict[int, Flight] = field(default_factory=dict)
    _queue: list[tuple[float, int, int, Flight]] = field(default_factory=list)
    _waiting: list[Flight] = field(default_factory=list)
    _running: tuple[dict[int, Flight], Iterator[Message]] | None = None
    _pushed: int = 0

    def __len__(self) -> int:
        return len(self.flying)

    def send(self, client: int, message: Message, *, version: int, holds: int, now: float, down_bytes: int) -> None:
        """Send a task; the client runs later."""
        flight = Flight(client, version, self.dispatched, now, down_bytes, holds, self._leaves(client, now), message)
        flight.arrives_s = self._arrival(flight, up_bytes=0, samples=0.0)
        self.dispatched += 1
        self.flying[client] = flight
        self._waiting.append(flight)
        self._push(flight)

    def next(self, grid: LocalGrid) -> Flight | None:
        """The flight that ends next, which stays in the queue; None where none is under way."""
        if grid.runs_beside and len(self._waiting) >= AHEAD:
            self._finish_running()
            self.start(grid)
        while self._queue:
            ends_s, _, _, flight = self._queue[0]
            if self.flying.get(flight.client) is flight:
                if flight.reply is None:
                    self._await(flight, grid)
                elif ends_s == flight.ends_s:
                    return flight
            heapq.heappop(self._queue)  # its earliest time, or one that has ended: the true time is in the queue too
        return None

    def end(self, flight: Flight) -> None:
        """Take a flight out."""
        del self.flying[flight.client]

    def start(self, grid: LocalGrid) -> None:
        """Hand the clients that were sent a task to the engine, unless it has others; its workers begin."""
        messages = [flight.message for flight in self._waiting if flight.message is not None]
        if self._running is None and messages:
            by_node = {
                message.metadata.dst_node_id: flight for message, flight in zip(messages, self._waiting, strict=True)
            }
            self._running, self._waiting = (by_node, iter(grid.send_and_receive(messages))), []

    def settle(self, grid: LocalGrid) -> None:
        """Let all clients that were sent a task run, which changes nothing of what they will have sent or when."""
        self._finish_running()
        self.start(grid)
        self._finish_running()

    def _await(self, flight: Flight, grid: LocalGrid) -> None:
        """Take results, in the order of the tasks, until that of a flight has come."""
        while flight.reply is None:
            self.start(grid)
            self._take_one()

    def _finish_running(self) -> None:
        while self._running is not None:
            self._take_one()

    def _take_one(self) -> None:
        """Take the next result of the clients that the engine has."""
        assert self._running is not None
        by_node, replies = self._running
        reply = next(replies)
        flight = by_node.pop(reply.metadata.src_node_id)
        if not by_node:
            self._running = None
        flight.message_id = reply.metadata.reply_to_message_id
        self._landed(flight, reply)

    def _landed(self, flight: Flight, reply: Message) -> None:
        flight.reply, flight.message = reply, None
        flight.arrives_s = self._arrival(flight, *work(reply))
        self._push(flight)

    def _arrival(self, flight: Flight, up_bytes: int, samples: float) -> float:
        device = self.device(flight.client)
        seconds = device.link.down_s(flight.down_bytes) + samples / device.samples_per_s + device.link.up_s(up_bytes)
        return flight.sent_s + seconds

    def _push(self, flight: Flight) -> None:
        self._pushed += 1
        heapq.heappush(self._queue, (flight.ends_s, flight.order, self._pushed, flight))

    def _leaves(self, client: int, now: float) -> float:
        until = math.inf if self.availability is None else self.availability.until(client, now)
        return now if until is None else until

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def saved(self) -> list[FlightSnapshot]:
        """All flights whose clients have run, in the order of their tasks."""
        return [
            FlightSnapshot(f.client, f.version, f.order, f.sent_s, f.down_bytes, f.message_id, packed(f.reply), f.holds)
            for f in sorted(self.flying.values(), key=lambda flight: flight.order)
            if f.reply is not None
        ]

    def restore(
        self,
        saved: Sequence[FlightSnapshot],
        dispatched: int,
        nodes: Callable[[int], int],
        owned: Callable[[int], bool],
    ) -> None:
        """Go on with the flights of a snapshot, in the place of those of its model's clients, who are `owned`."""
        self.flying = {client: flight for client, flight in self.flying.items() if not owned(client)}
        self._waiting = [flight for flight in self._waiting if not owned(flight.client)]
        self.dispatched, self._running = dispatched, None
        for each in saved:
            leaves_s = self._leaves(each.client, each.sent_s)
            flight = Flight(each.client, each.version, each.order, each.sent_s, each.down_bytes, each.holds, leaves_s)
            flight.message_id = each.message_id
            self.flying[each.client] = flight
            self._landed(flight, unpacked(each, nodes(each.client)))


def devices_of(context: ServerContext) -> Callable[[int], Device]:
    """Client -> link and speed: of the trace, or drawn once by the network."""
    if (devices := context.devices) is not None:
        return devices.__getitem__
    network = context.accounting.network

    @cache
    def drawn(client: int) -> Device:
        link, speed = network.profile(client, seed=context.seed)
        return Device(link, network.samples_per_s * speed)

    return drawn
