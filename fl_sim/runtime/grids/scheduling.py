"""Grouping of clients into tasks: sending a task and taking its answer costs much beside a small client."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

NEARLY = 1.02
"""Longest of consecutive groups over their mean. Reading replies while the last group trains saves a percent or two of a
short round, so more imbalance than that would lose what it gains."""

LINK, MUCH = 125e6, 4
"""Bytes a second of a link of 1 Gbit/s; how many times longer than their replies' way clients compute where that is much."""


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


def whole(costs: Sequence[float], *, workers: int, seconds: float, nbytes: float) -> list[int]:
    """Positions of the blocks that workers fold whole; the clients of the others are tasks of their own, whose replies cross.

    Args:
        costs: of the blocks.
        workers: their number.
        seconds: that a client takes; infinite while nobody knows.
        nbytes: of its reply.
    """
    if seconds * LINK < nbytes:  # what evens out the workers' time by a client costs more time than that on its way
        return list(range(len(costs)))
    return evenly(costs, workers=workers, spare=computes_longer(seconds, nbytes, workers))


def evenly(costs: Sequence[float], *, workers: int, spare: bool = False) -> list[int]:
    """Positions of tasks, in order, that can be dealt out whole; the rest is for smaller tasks that fill up.

    Each goes to the worker that has least so far, unless that would have more than its share of all costs, give or take a quarter
    of the longest. With `spare` the longest's time is left for smaller tasks. One worker takes all of them.
    """
    share = sum(costs) / workers
    limit = share + max(costs) / 4 - (max(costs) if spare and workers > 1 else 0.0)
    loads = [0.0] * workers
    dealt = []
    for position, cost in enumerate(costs):
        if loads[0] + cost <= limit:
            heapq.heapreplace(loads, loads[0] + cost)
            dealt.append(position)
    return dealt


def computes_longer(seconds: float, nbytes: float, workers: int) -> bool:
    """Whether clients of so many seconds keep the workers busy for much longer than their replies keep a link of `LINK`.

    Then it counts that all workers end together, and not what crosses. Infinite seconds are not known yet.
    """
    return MUCH * workers * nbytes / LINK < seconds < math.inf


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
