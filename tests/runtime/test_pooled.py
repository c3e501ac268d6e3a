"""How a round is spread over workers, in virtual time: order, retries, bounded memory, and how long workers idle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, product

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fl_sim.communication.flower_private import set_message_id
from fl_sim.runtime.grids.base import FIRST_NODE
from fl_sim.runtime.grids.costs import Costs
from fl_sim.runtime.grids.dispatch import Finished
from fl_sim.runtime.grids.pool import PooledGrid
from fl_sim.runtime.grids.running_sums import HandIn
from fl_sim.runtime.grids.scheduling import packed
from fl_sim.runtime.grids.worker import Answer, Jobs


class VirtualPool(PooledGrid):
    """Workers whose clients take known seconds; those named in `deadly` end their worker."""

    def __init__(self, seconds: Sequence[float], workers: int, deadly: frozenset[int] = frozenset()) -> None:
        super().__init__(len(seconds), sizes=[max(1, round(100 * s)) for s in seconds])
        self.seconds, self.deadly = seconds, deadly
        self.numbers = count()
        self.queues: dict[int, deque[Jobs]] = {}
        self.free_at: dict[int, float] = {}
        self.now = 0.0
        self.worked = 0.0
        self.ran: list[int] = []
        self.task_sizes: list[int] = []
        for _ in range(workers):
            self.start()

    def start(self) -> None:
        number = next(self.numbers)
        self.queues[number], self.free_at[number] = deque(), self.now

    def workers(self) -> Sequence[int]:
        return list(self.queues)

    def announce(self, contents: Mapping[int, RecordDict]) -> None:
        self.told = contents

    def submit(self, worker: int, jobs: Jobs) -> None:
        self.task_sizes.append(len(jobs))
        if not self.queues[worker]:
            self.free_at[worker] = max(self.free_at[worker], self.now)
        self.queues[worker].append(jobs)

    def _ends(self, worker: int) -> float:
        return self.free_at[worker] + sum(self.seconds[self.partitions[job.node]] for job in self.queues[worker][0])

    def ask(self, worker: int, task: HandIn) -> None:
        raise AssertionError("nothing is folded here")

    def finished(self, timeout: float | None) -> Sequence[Finished]:
        busy = [worker for worker, queue in self.queues.items() if queue]
        if not busy or timeout == 0:
            return ()
        worker = min(busy, key=self._ends)
        self.worked += self._ends(worker) - self.free_at[worker]
        self.now = self.free_at[worker] = self._ends(worker)
        jobs = self.queues[worker][0]
        partitions = [self.partitions[job.node] for job in jobs]
        if self.deadly & set(partitions):
            return (Finished(worker, (), lost="it"),)
        self.queues[worker].popleft()
        self.ran += partitions
        return (Finished(worker, [self._answer(job.index, job.node) for job in jobs]),)

    def _answer(self, index: int, node: int) -> Answer:
        reply = Message(RecordDict({"c": ConfigRecord({"index": index})}), reply_to=self.messages[index])
        set_message_id(reply, f"r{index}")
        return Answer(reply, None, self.seconds[self.partitions[node]])

    def replace(self, worker: int) -> None:
        del self.queues[worker], self.free_at[worker]
        self.start()

    def is_ready(self, worker: int) -> bool:
        return True

    def round(self, payload: int = 0) -> Iterator[Message]:
        content = RecordDict({"c": ConfigRecord({}), "p": ArrayRecord({"p": Array(np.zeros(payload, np.uint8))})})
        self.messages = [Message(content, FIRST_NODE + p, "train") for p in range(len(self.seconds))]
        return iter(self.send_and_receive(self.messages))


@given(
    seconds=st.lists(st.floats(0.001, 1), min_size=1, max_size=40),
    workers=st.integers(1, 5),
    per_task=st.sampled_from([None, 1, 3]),
    deadly=st.frozensets(st.integers(0, 39), max_size=3),
)
def test_every_client_answers_once_in_order_and_only_deadly_ones_are_lost(
    seconds: list[float], workers: int, per_task: int | None, deadly: frozenset[int]
) -> None:
    pool = VirtualPool(seconds, workers, deadly)
    pool.clients_per_task = per_task
    for _ in range(2):
        pool.ran = []
        replies = list(pool.round())
        assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in pool.messages]
        lost = {i for i, reply in enumerate(replies) if reply.has_error()}
        assert lost == deadly & set(range(len(seconds)))
        assert sorted(pool.ran) == sorted(set(range(len(seconds))) - lost)
        assert len(pool.workers()) == workers


@pytest.mark.parametrize(
    ("clients", "payload", "together"),
    [
        (640, 0, 32),  # as many as a task ever carries
        (640, 400_000, 32),
        (640, 3_900_000, 4),  # 16 MB of answers
        (640, 20_000_000, 1),
        (80, 0, 5),  # eight tasks for each of two workers
        (9, 0, 1),
    ],
)
def test_small_payloads_travel_together_and_large_ones_alone(clients: int, payload: int, together: int) -> None:
    pool = VirtualPool([1.0] * clients, 2)
    assert len(list(pool.round(payload))) == clients
    assert pool.task_sizes == [together] * (clients // together)


def test_short_clients_travel_together_once_their_time_is_known() -> None:
    pool = VirtualPool([0.002] * 10, 2)
    for sizes in ([1] * 10, [5] * 2):
        pool.task_sizes = []
        list(pool.round())
        assert pool.task_sizes == sizes


@given(
    costs=st.lists(st.floats(0.001, 1), min_size=1, max_size=40),
    workers=st.integers(1, 5),
    tasks=st.integers(1, 12),
    most=st.integers(1, 12),
)
def test_tasks_are_a_partition_of_the_round(costs: list[float], workers: int, tasks: int, most: int) -> None:
    groups = packed(costs, workers=workers, tasks=tasks, most=most)
    assert sorted(position for group in groups for position in group) == list(range(len(costs)))
    assert all(group == sorted(group) and 1 <= len(group) <= most for group in groups)
    if tasks > workers:
        assert [position for group in groups for position in group] == list(range(len(costs)))
        # Cut where an even share of what is left is reached: none exceeds the first share by more than its last client.
        assert most < len(costs) or all(
            sum(costs[p] for p in group[:-1]) <= sum(costs) / tasks + 1e-9 for group in groups
        )


def test_even_groups_are_consecutive_and_others_balanced() -> None:
    assert packed([1.0] * 10, workers=2, tasks=2, most=32) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert packed([3.0, 3.0, 1.0, 1.0], workers=2, tasks=2, most=32) == [[0, 2], [1, 3]]


@given(costs=st.lists(st.floats(0.001, 1), min_size=2, max_size=8))
def test_one_task_a_worker_is_nearly_the_best_balance(costs: list[float]) -> None:
    """Graham's bound for two machines, against every way to share the clients: 7/6."""
    loads = [sum(costs[p] for p in group) for group in packed(costs, workers=2, tasks=2, most=8)]
    ways = [
        sum(c for c, first in zip(costs, way, strict=True) if first)
        for way in product([False, True], repeat=len(costs))
    ]
    assert max(loads) <= 7 / 6 * min(max(one, sum(costs) - one) for one in ways) + 1e-9


def test_workers_idle_little_on_a_skewed_federation() -> None:
    seconds = np.random.default_rng(0).dirichlet([0.5] * 100) * 100
    for workers in (2, 4):
        pool = VirtualPool(list(seconds), workers)
        pool.clients_per_task = 1
        list(pool.round())
        assert pool.worked / (workers * pool.now) > 0.95


def test_replies_that_wait_are_bounded() -> None:
    """The first client is by far the shortest, so it starts last; the others may not all run ahead of it."""
    pool = VirtualPool([0.001, *[1.0] * 99], 2)
    pool.window_bytes = 0
    pool.clients_per_task = 1
    replies = pool.round()
    next(replies)
    assert len(pool.ran) <= 4 * 2 * 2


def test_a_round_that_nobody_reads_to_its_end_leaves_idle_workers() -> None:
    pool = VirtualPool([1.0] * 9, 2)
    replies = pool.round()
    next(replies)
    with pytest.raises(RuntimeError, match="one round at a time"):
        next(pool.round())
    replies.close()
    assert not any(pool.queues.values())
    assert len(list(pool.round())) == 9


def test_a_round_ends_with_its_last_reply_though_nobody_asks_for_one_more() -> None:
    pool = VirtualPool([1.0] * 9, 2)
    replies = pool.round()
    assert len([next(replies) for _ in range(9)]) == 9
    assert len(list(pool.round())) == 9  # `replies` is still held, and not exhausted


def test_tasks_are_at_the_workers_before_a_reply_is_asked_for() -> None:
    pool = VirtualPool([1.0] * 9, 2)
    replies = pool.round()
    assert sum(map(len, pool.queues.values())) == 4  # two tasks of one client each
    assert len(list(replies)) == 9


def test_costs_are_by_samples_until_a_node_shows_its_own() -> None:
    costs = Costs([10, 20, 40])
    assert [costs.expect("train", p) for p in range(3)] == [10, 20, 40]
    costs.learn("train", 0, 5.0)
    assert [costs.expect("train", p) for p in range(3)] == [5.0, 10.0, 20.0]
    assert costs.expect("evaluate", 0) == 10  # another kind of work has its own times
    costs.learn("train", 1, 30.0)  # three times as long as its samples say: half of it is reconstructed, then more
    assert costs.expect("train", 1) == 20.0
    for _ in range(6):
        costs.learn("train", 1, 30.0)
    assert costs.expect("train", 1) == pytest.approx(30.0, rel=0.01)
