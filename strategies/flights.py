"""Clients that train while the server goes on: the queue of their updates in virtual time.

A client runs when its result is needed, together with all others that were sent a task by then, on whatever engine. When its
update arrives follows from sizes, link, speed and samples alone, so that the order of events depends on no engine and no batch.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from flwr.app import Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fl_sim.codecs import CorruptPayload
from fl_sim.communication import messages as wire
from fl_sim.communication.flower_private import reply_to, set_message_id
from fl_sim.communication.traces import Availability, Device
from fl_sim.runtime.server_context import FlightSnapshot, ServerContext


@dataclass(eq=False)
class Flight:
    """A client on its way: its task was sent, its update has not arrived.

    Attributes:
        client: its number.
        version: rounds finished when its task was sent.
        order: number of the task among all tasks.
        sent_s: virtual time at which the task was sent.
        down_bytes: payload bytes of the task.
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
    _running: tuple[list[Flight], Iterable[Message]] | None = None
    _pushed: int = 0

    def __len__(self) -> int:
        return len(self.flying)

    def send(self, client: int, message: Message, *, version: int, now: float, down_bytes: int) -> None:
        """Send a task; the client runs later."""
        until = math.inf if self.availability is None else self.availability.until(client, now)
        leaves_s = now if until is None else until
        flight = Flight(client, version, self.dispatched, now, down_bytes, leaves_s, message)
        flight.arrives_s = self._arrival(flight, up_bytes=0, samples=0.0)
        self.dispatched += 1
        self.flying[client] = flight
        self._waiting.append(flight)
        self._push(flight)

    def next(self, grid: Grid) -> Flight | None:
        """The flight that ends next, which stays in the queue; None where none is under way."""
        while self._queue:
            ends_s, _, _, flight = self._queue[0]
            if self.flying.get(flight.client) is flight and ends_s == flight.ends_s and flight.reply is not None:
                return flight
            if flight.reply is None:
                self.run(grid)
            heapq.heappop(self._queue)  # its earliest time, or one that has ended: the true time is in the queue too
        return None

    def end(self, flight: Flight) -> None:
        """Take a flight out."""
        del self.flying[flight.client]

    def start(self, grid: Grid) -> None:
        """Hand the clients that were sent a task to the engine, whose workers begin; `run` takes the results."""
        messages = [flight.message for flight in self._waiting if flight.message is not None]
        if self._running is None and messages:
            self._running = self._waiting, grid.send_and_receive(messages)
            self._waiting = []

    def run(self, grid: Grid) -> None:
        """Take the results of the clients that were started, or else start those that were sent a task and take theirs."""
        self.start(grid)
        if self._running is not None:
            (running, replies), self._running = self._running, None
            by_node = {flight.message.metadata.dst_node_id: flight for flight in running if flight.message is not None}
            for reply in replies:
                flight = by_node[reply.metadata.src_node_id]
                flight.message_id = reply.metadata.reply_to_message_id
                self._landed(flight, reply)

    def _landed(self, flight: Flight, reply: Message) -> None:
        flight.reply, flight.message = reply, None
        flight.arrives_s = self._arrival(flight, *_work(reply))
        self._push(flight)

    def _arrival(self, flight: Flight, up_bytes: int, samples: float) -> float:
        device = self.device(flight.client)
        seconds = device.link.down_s(flight.down_bytes) + samples / device.samples_per_s + device.link.up_s(up_bytes)
        return flight.sent_s + seconds

    def _push(self, flight: Flight) -> None:
        self._pushed += 1
        heapq.heappush(self._queue, (flight.ends_s, flight.order, self._pushed, flight))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def saved(self, grid: Grid) -> list[FlightSnapshot]:
        """All flights; clients that have not run do so now, which changes nothing of what they will have sent or when."""
        while self._waiting or self._running:
            self.run(grid)
        return [
            FlightSnapshot(f.client, f.version, f.order, f.sent_s, f.down_bytes, f.message_id, _packed(f.reply))
            for f in sorted(self.flying.values(), key=lambda flight: flight.order)
            if f.reply is not None
        ]

    def restore(self, saved: Sequence[FlightSnapshot], dispatched: int, nodes: Callable[[int], int]) -> None:
        """Go on with the flights of a snapshot."""
        self.dispatched, self.flying, self._queue, self._waiting, self._running = dispatched, {}, [], [], None
        for each in saved:
            until = math.inf if self.availability is None else self.availability.until(each.client, each.sent_s)
            leaves_s = each.sent_s if until is None else until
            flight = Flight(each.client, each.version, each.order, each.sent_s, each.down_bytes, leaves_s)
            flight.message_id = each.message_id
            self.flying[each.client] = flight
            self._landed(flight, _unpacked(each, nodes(each.client)))


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


def _work(reply: Message) -> tuple[int, float]:
    """(payload bytes of a reply, samples that its client trained on); an error takes no time beside the links'."""
    if reply.has_error():
        return 0, 0.0
    try:
        count, metrics = wire.read_metrics(reply.content)
        return len(wire.payload(reply.content)), metrics.get("examples", count)
    except CorruptPayload:
        return wire.array_bytes(reply.content), 0.0


def _packed(reply: Message | None) -> bytes:
    """A reply as bytes: the length of a JSON text, the text, the payload."""
    assert reply is not None
    if reply.has_error():
        told: dict[str, object] = {"error": [reply.error.code, reply.error.reason or ""]}
        data: bytes | memoryview = b""
    else:
        record = reply.content[wire.METRICS]
        assert isinstance(record, MetricRecord)
        told, data = {"metrics": dict(record)}, wire.payload(reply.content)
    text = json.dumps(told).encode()
    return len(text).to_bytes(4, "little") + text + bytes(data)


def _unpacked(saved: FlightSnapshot, node: int) -> Message:
    """Invert `_packed`, as the reply to the task that it answered.

    Raises:
        ValueError, LookupError: bytes that no run wrote.
    """
    size = int.from_bytes(saved.reply[:4], "little")
    told, data = json.loads(saved.reply[4 : 4 + size]), saved.reply[4 + size :]
    task = Message(RecordDict(), node, MessageType.TRAIN, group_id=str(saved.version + 1))
    set_message_id(task, saved.message_id)
    if "error" in told:
        code, reason = told["error"]
        reply = Message(Error(int(code), str(reason)), reply_to=task)
    else:
        reply = reply_to(task, wire.content(data, metrics=told["metrics"]))
    set_message_id(reply, f"r{saved.message_id}")
    return reply
