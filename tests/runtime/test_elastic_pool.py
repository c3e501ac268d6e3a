"""A pool whose machines come and go: every client answers once, in order, and none is blamed for a machine."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fl_sim.communication.flower_private import set_message_id
from fl_sim.core.types import UserError
from fl_sim.runtime.grids.base import FIRST_NODE
from fl_sim.runtime.grids.dispatch import Finished
from fl_sim.runtime.grids.faults import Faults
from fl_sim.runtime.grids.heartbeat import EVERY_S, Heartbeat
from fl_sim.runtime.grids.pool import PooledGrid
from fl_sim.runtime.grids.running_sums import HandIn
from fl_sim.runtime.grids.worker import Answer, Jobs


class Machines(PooledGrid):
    """Workers that join and are lost by a script: at each step one of them, or (None) the next task is done."""

    def __init__(self, clients: int, script: Sequence[str | None]) -> None:
        super().__init__(clients)
        self.script = deque(script)
        self.queues: dict[int, deque[Jobs]] = {0: deque()}
        self.numbers = iter(range(1, 1000))
        self.ran: list[int] = []

    def workers(self) -> Sequence[int]:
        return list(self.queues)

    def announce(self, contents: Mapping[int, RecordDict]) -> None:
        pass

    def submit(self, worker: int, jobs: Jobs) -> None:
        self.queues[worker].append(jobs)

    def ask(self, worker: int, task: HandIn) -> None:
        raise AssertionError("nothing is folded here")

    def finished(self, timeout: float | None) -> Sequence[Finished]:
        event = self.script.popleft() if self.script else None
        if event == "join":
            self.queues[next(self.numbers)] = deque()
            return ()
        worker = next((number for number, queue in self.queues.items() if queue), min(self.queues))
        if event == "lost" and len(self.queues) > 1:
            return (Finished(worker, (), lost="its machine is gone", machine=True),)
        if not self.queues[worker]:
            return ()
        jobs = self.queues[worker].popleft()
        self.ran += [job.partition for job in jobs]
        return (Finished(worker, [self._answer(job.index) for job in jobs]),)

    def _answer(self, index: int) -> Answer:
        reply = Message(RecordDict({"c": ConfigRecord({"index": index})}), reply_to=self.messages[index])
        set_message_id(reply, f"r{index}")
        return Answer(reply, None, 0.01)

    def replace(self, worker: int) -> None:
        del self.queues[worker]  # the pool shrinks

    def is_ready(self, worker: int) -> bool:
        return True

    def round(self) -> Iterator[Message]:
        content = RecordDict({"c": ConfigRecord({})})
        self.messages = [Message(content, FIRST_NODE + node, "train") for node in range(len(self.partitions))]
        return iter(self.send_and_receive(self.messages))


@given(
    clients=st.integers(1, 30),
    script=st.lists(st.sampled_from(["join", "lost", None]), max_size=60),
    per_task=st.sampled_from([None, 1, 3]),
)
def test_whatever_joins_and_is_lost_every_client_answers_once_in_order(
    clients: int, script: list[str | None], per_task: int | None
) -> None:
    pool = Machines(clients, script)
    pool.clients_per_task = per_task
    for _ in range(2):
        pool.ran = []
        replies = list(pool.round())
        assert [int(reply.content["c"]["index"]) for reply in replies] == list(range(clients))
        assert sorted(pool.ran) == list(range(clients))


def test_a_client_whose_machines_are_lost_again_and_again_is_never_given_up() -> None:
    pool = Machines(1, ["join", "lost"] * 5)
    assert [reply.has_error() for reply in pool.round()] == [False]
    assert len(pool.script) == 0


def test_a_port_that_closes_is_a_lost_machine_at_once() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server, closing(Heartbeat(1000.0)) as heartbeat:
        heartbeat.watch({"a": ("127.0.0.1", server.getsockname()[1])})
        assert heartbeat.ask("a")
        assert not heartbeat.lost
        server.close()
        assert not heartbeat.ask("a")
        assert list(heartbeat.lost) == ["a"]
        assert heartbeat.ask("never watched")


def test_a_machine_that_does_not_answer_is_lost_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes connections from this port, and its queue is full: the next one hangs, as where a cable was cut."""
    monkeypatch.setattr("fl_sim.runtime.grids.heartbeat.PATIENCE_S", 0.1)
    with closing(socket.socket()) as server, closing(Heartbeat(0.25)) as heartbeat:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(server.getsockname())
        monkeypatch.setattr("fl_sim.runtime.grids.heartbeat.EVERY_S", 1000.0)
        heartbeat.watch({"a": server.getsockname()})
        assert not heartbeat.ask("a")
        assert not heartbeat.lost, "0.1 s of silence are allowed"
        time.sleep(0.2)
        assert not heartbeat.ask("a")
        assert heartbeat.lost["a"].startswith("no answer for ")
        for each in waiting:
            each.close()


@pytest.mark.slow
def test_the_heart_is_listened_to_by_itself() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server, closing(Heartbeat(1000.0)) as heartbeat:
        heartbeat.watch({"a": ("127.0.0.1", server.getsockname()[1])})
        time.sleep(2 * EVERY_S)
        assert not heartbeat.lost
        server.close()
        time.sleep(2 * EVERY_S)
        assert heartbeat.lost


@pytest.mark.parametrize("seconds", [0, -1, 2e9, float("nan")])
def test_a_silence_that_no_machine_can_keep_is_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"faults\.node_timeout_s = "):
        Faults(node_timeout_s=seconds)
