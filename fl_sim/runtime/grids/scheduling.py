"""Grouping of clients into tasks: sending a task and taking its answer costs much beside a small client."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

NEARLY = 1.02
"""Longest of consecutive groups over their mean. Reading replies while the last group trains saves a percent or two of a
short round, so more imbalance than that would lose what it gains."""

DEPTH = 2
"""Tasks at a worker: the one it is at, and the next."""
TASK_BYTES = 16_000_000
"""Clients of one task answer together: about this much at a time."""
TASKS, CLIENTS = 8, 32
"""Tasks that every worker gets in a round, so that all end together; clients of a task at most."""
TASK_S, LONG_S = 0.05, 0.4
"""What a task should last at least: what it costs to send one and to take its answer must weigh little beside that. What one should
last at most where only receipts come back, so that there may be many."""
MANY_TASKS, MANY_CLIENTS = 64, 128
"""Where only receipts come back and there would be more tasks than that, they are of more clients, up to so many."""


@dataclass(frozen=True)
class Limits:
    """What bounds the tasks of a round.

    Attributes:
        clients: of each task at most, as the user says; None = whatever suits.
        nbytes: of a reply, about.
        is_folded: whether only receipts come back.
        is_timed: whether clients have a time limit: as many times as long as a task has clients, a hanging one is not noticed.
    """

    clients: int | None = None
    nbytes: float = 1.0
    is_folded: bool = False
    is_timed: bool = False

    def most(self, cohort: int) -> int:
        """Clients of a task at most."""
        if self.clients is not None:
            return self.clients
        if not self.is_folded:
            return int(max(1, min(CLIENTS, TASK_BYTES // self.nbytes)))
        return CLIENTS if self.is_timed else min(max(cohort // MANY_TASKS, CLIENTS), MANY_CLIENTS)

    def tasks(self, cohort: int, *, workers: int, seconds: float) -> int:
        """Tasks of a round whose clients take so many seconds in all; infinite while nobody knows.

        Enough for all workers to end together, none too short; where only receipts come back none too long, and as many for each.
        """
        if self.clients is not None:
            return workers
        each = int(max(1, min(TASKS, seconds / (workers * TASK_S))))
        if self.is_folded:
            long = 0 if math.isinf(seconds) else int(seconds / (workers * LONG_S))
            each = max(each, long, math.ceil(cohort / (workers * self.most(cohort))))
        return workers * each


def packed(costs: Sequence[float], *, workers: int, tasks: int, most: int) -> list[list[int]]:
    """Positions of `costs` in groups of about equal cost, each in ascending order and of at most `most`.

    As many groups as `tasks`, or more where `most` asks for it. They are consecutive, so that replies can be read in order
    while later groups run. Where every worker gets a single group, balance comes first: longest processing time (Graham,
    1969), at most 4/3 of the best possible, unless consecutive groups are `NEARLY` even.
    """
    consecutive = _consecutive(costs, tasks, most)
    if tasks > workers or len(costs) > workers * most:
        return consecutive
    count = min(workers, len(costs))
    longest = max(sum(costs[position] for position in group) for group in consecutive)
    even = len(consecutive) <= workers and longest <= NEARLY * sum(costs) / count
    return consecutive if even else _balanced(costs, count, most)


def _balanced(costs: Sequence[float], count: int, most: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, number) for number in range(count)]
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        load, number = heapq.heappop(loads)
        groups[number].append(position)
        if len(groups[number]) < most:
            heapq.heappush(loads, (load + costs[position], number))
    return [sorted(group) for group in groups]


def _consecutive(costs: Sequence[float], count: int, most: int) -> list[list[int]]:
    groups: list[list[int]] = []
    left, share, load = sum(costs), 0.0, 0.0
    for position, cost in enumerate(costs):
        if not groups or len(groups[-1]) == most or load >= share:
            left -= load
            share, load = left / max(1, count - len(groups)), 0.0
            groups.append([])
        groups[-1].append(position)
        load += cost
    return groups
