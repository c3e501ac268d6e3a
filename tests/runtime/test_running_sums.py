"""Sums that workers keep through a round: whatever dies and joins, each client's update is in what is handed in exactly once, made
from what the client kept before the round, and is told of once."""

from __future__ import annotations

import random
from ast import literal_eval
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from properties import examples

from fl_sim.codecs import Description
from fl_sim.communication.flower_private import set_message_id
from fl_sim.runtime.grids.base import FIRST_NODE
from fl_sim.runtime.grids.dispatch import Finished
from fl_sim.runtime.grids.folding import Foldable, FoldedReply, HandedIn, Receipt
from fl_sim.runtime.grids.pool import PooledGrid
from fl_sim.runtime.grids.running_sums import HandIn, hand_in_after
from fl_sim.runtime.grids.worker import Answer, Job, Jobs
from fl_sim.runtime.state.client_states import ClientStates

RUNS = "runs"
Sum = list[tuple[int, int]]
"""(client, how often it had run) of each update in a sum."""


def travels(client: int) -> bool:
    return client % 7 == 3


def is_rejected(client: int) -> bool:
    return client % 11 == 5


class Scripted(PooledGrid):
    """Workers on machines: at each step a worker does its oldest task, its process dies, its machine is lost, or one joins.

    Workers add up which clients they ran, and what these kept. Those of `places[n]` None are on the program's machine.
    """

    def __init__(
        self, folder: Path, clients: int, places: Sequence[str | None], script: Sequence[tuple[str, int]]
    ) -> None:
        super().__init__(clients)
        self.contexts = self.states = ClientStates(self.contexts.nodes, folder)
        self.script = deque(script)
        self.numbers = iter(range(10_000))
        self.queues: dict[int, deque[tuple[Jobs, list[int]] | HandIn]] = {}
        self.held: dict[int, Sum] = {}
        self.at: dict[int, str | None] = {}
        self.ever: dict[int, str | None] = {}
        self.gone: set[int] = set()
        self.blamed: set[int] = set()
        self.crossed: list[int] = []
        for place in (None, *places):
            self._join(place)

    def _join(self, place: str | None) -> None:
        number = next(self.numbers)
        self.queues[number], self.held[number], self.at[number], self.ever[number] = deque(), [], place, place

    def workers(self) -> Sequence[int]:
        return list(self.queues)

    def place(self, worker: int) -> str | None:
        return self.at[worker]

    def announce(self, contents: Mapping[int, RecordDict]) -> None:
        pass

    def submit(self, worker: int, jobs: Jobs) -> None:
        self.queues[worker].append((jobs, [_runs(self.contexts[job.node]) for job in jobs]))

    def ask(self, worker: int, task: HandIn) -> None:
        assert not any(isinstance(each, HandIn) for each in self.queues[worker])
        assert not (task.aside and task.others)
        self.queues[worker].append(task)

    def finished(self, timeout: float | None) -> Sequence[Finished]:
        if timeout == 0:
            return ()
        event, number = self.script.popleft() if self.script else ("done", 0)
        busy = [worker for worker, queue in self.queues.items() if queue]
        worker = (busy or list(self.queues))[number % len(busy or self.queues)]
        place = self.at[worker]
        if event == "join":
            self._join(("a", "b", None)[number % 3])
            return ()
        if event == "machine" and place is not None:
            self.gone |= {number for number, where in self.ever.items() if where == place}
            return [Finished(each, (), lost="gone", machine=True) for each in self.queues if self.at[each] == place]
        if event == "dies" and self._may_die(worker):
            return (Finished(worker, (), lost="SIGKILL"),)
        return (self._done(worker),) if busy else ()

    def _may_die(self, worker: int) -> bool:
        """Nobody dies twice of the same client, which would be given up."""
        first = self.queues[worker][0] if self.queues[worker] else HandIn()
        clients = set() if isinstance(first, HandIn) else {job.partition for job in first[0]}
        again = self.blamed & clients
        self.blamed |= clients
        return not again

    def _done(self, worker: int) -> Finished:
        task = self.queues[worker].popleft()
        if isinstance(task, HandIn):
            held, self.held[worker] = self.held[worker], []
            if task.aside:
                return Finished(worker, (), sums=(self.at[worker], worker, held))
            for other in task.others:
                place, number, theirs = other.found  # type: ignore[misc]
                assert place == self.at[worker]
                assert number not in self.gone, "it is at hand"
                held += theirs
            self.crossed.append(worker)
            return Finished(worker, (), sums=RecordDict({"c": ConfigRecord({"sum": repr(held)})}))
        jobs, runs = task
        return Finished(worker, [self._answer(worker, job, ran) for job, ran in zip(jobs, runs, strict=True)])

    def _answer(self, worker: int, job: Job, ran: int) -> Answer:
        client = job.partition
        reply = Message(RecordDict({"c": ConfigRecord({"index": job.index})}), reply_to=self.messages[job.index])
        set_message_id(reply, f"r{job.index}")
        receipt = None
        if job.again or (job.fold and not travels(client)):
            receipt = Receipt(Description.opaque(1), 0, rejected="why" if is_rejected(client) else None)
            if not is_rejected(client):
                self.held[worker].append((client, ran))
        context = self.contexts.fresh(job.node, RecordDict({RUNS: ArrayRecord({RUNS: Array(np.array([ran + 1.0]))})}))
        return Answer(reply, context if client % 2 else None, 1.0, receipt)

    def replace(self, worker: int) -> None:
        place = self.at.pop(worker)
        del self.queues[worker], self.held[worker]
        self._join(place if worker % 2 else None)

    def is_ready(self, worker: int) -> bool:
        return True

    def round(self) -> Iterator[Message | FoldedReply | HandedIn]:
        content = RecordDict({"c": ConfigRecord({})})
        self.messages = [Message(content, FIRST_NODE + p, "train") for p in range(len(self.partitions))]
        self.blamed, self.crossed = set(), []
        return self.send_and_fold(self.messages, Foldable(lambda _: lambda _: None, RecordDict({}), 8))  # type: ignore[arg-type, return-value]


def _runs(context: Context) -> int:
    return int(context.state[RUNS][RUNS].numpy()[0]) if RUNS in context.state else 0


@pytest.mark.parametrize("seed", range(examples(300)))
def test_each_update_is_handed_in_once_and_told_of_once(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    clients, often = rng.randint(1, 40), rng.random()
    script = [
        (rng.choice(["dies", "machine", "join"]) if rng.random() < often else "done", rng.randrange(50))
        for _ in range(rng.randint(0, 120))
    ]
    monkeypatch.setattr("fl_sim.runtime.grids.running_sums.HAND_IN_S", rng.choice([1.5, 6.0, 1000.0]))
    pool = Scripted(tmp_path, clients, rng.choices([None, "a", "a", "b"], k=rng.randint(0, 6)), script)
    pool.clients_per_task = rng.choice([None, 1, 3])
    for number in range(3):
        came = list(pool.round())
        replies = [each for each in came if not isinstance(each, HandedIn)]
        assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in pool.messages]
        assert pool.traffic.replies == (number + 1) * clients, "nobody is told of twice"
        assert not isinstance(came[-1], HandedIn)
        folded = [
            client
            for client, reply in enumerate(replies)
            if isinstance(reply, FoldedReply) and reply.receipt.rejected is None
        ]
        sums: Counter[tuple[int, int]] = Counter()
        for each in came:
            if isinstance(each, HandedIn):
                sums.update(literal_eval(str(each.content["c"]["sum"])))
        assert sums == Counter({(client, number if client % 2 else 0): 1 for client in folded})
        told = {client: _runs(pool.contexts[FIRST_NODE + client]) for client in range(clients)}
        assert told == {client: number + 1 if client % 2 else 0 for client in range(clients)}
        assert _users(pool) == sum(len(names) for names in pool.states.kept().values()), "nothing is kept for nobody"


def _users(pool: Scripted) -> int:
    return sum(blob.users for blob in pool.states._heap._blobs.values())


def test_a_sum_of_each_worker_here_and_of_each_other_machine_crosses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_sim.runtime.grids.running_sums.HAND_IN_S", 1000.0)
    pool = Scripted(tmp_path, 200, [None, "a", "a", "a", "b", "b"], [])
    list(pool.round())
    assert sorted(str(pool.at[worker]) for worker in pool.crossed) == ["None", "None", "a", "b"]


def test_in_a_long_round_sums_are_handed_in_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Scripted(tmp_path, 200, ["a", "a"], [])
    pool.clients_per_task = 1
    list(pool.round())
    often = len(pool.crossed)
    monkeypatch.setattr("fl_sim.runtime.grids.running_sums.HAND_IN_S", 1000.0)
    list(pool.round())
    assert (often >= 10, len(pool.crossed)) == (True, 2)


def test_large_sums_are_handed_in_less_often() -> None:
    assert hand_in_after(8e6) == 10.0
    assert hand_in_after(8e8) == pytest.approx(20 * 6.4)


def test_a_client_that_fails_when_it_runs_again_stops_the_round(tmp_path: Path) -> None:
    """Its first update was counted: no number of the round would be right."""

    class Fails(Scripted):
        def _answer(self, worker: int, job: Job, ran: int) -> Answer:
            answer = super()._answer(worker, job, ran)
            return Answer(answer.reply, None, 1.0) if job.again else answer

    pool = Fails(tmp_path, 8, [], [("done", 0), ("dies", 0)])
    pool.clients_per_task = 2
    with pytest.raises(RuntimeError, match=r"client 0: its update was lost with its worker.*--resume"):
        list(pool.round())


@pytest.mark.parametrize("seed", range(60))
def test_no_client_is_blamed_for_a_death_among_others(seed: int, tmp_path: Path) -> None:
    """Also one that has run alone already, and runs again beside others because its sum was lost."""

    class DiesAmongOthers(Scripted):
        def _may_die(self, worker: int) -> bool:
            first = self.queues[worker][0] if self.queues[worker] else HandIn()
            return not isinstance(first, HandIn) and len(first[0]) > 1

    rng = random.Random(seed)
    script = [("dies" if rng.random() < 0.4 else "done", rng.randrange(50)) for _ in range(200)]
    pool = DiesAmongOthers(tmp_path, 20, [], script)
    pool.clients_per_task = 2
    replies = [each for each in pool.round() if not isinstance(each, HandedIn)]
    assert not any(isinstance(reply, Message) and reply.has_error() for reply in replies)


def test_what_was_kept_before_is_given_up_where_nobody_reads_on(tmp_path: Path) -> None:
    pool = Scripted(tmp_path, 30, [], [])
    pool.clients_per_task = 2
    replies = pool.round()
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert _users(pool) == sum(len(names) for names in pool.states.kept().values())
