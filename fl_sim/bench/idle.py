"""Idle time of resident workers: between clients, and at the end of a round for the slowest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from fl_sim.bench.contest import Flat, opened, rounds, spread_of
from fl_sim.bench.workloads import Workload
from fl_sim.runtime.grids.pool import PooledGrid


def idle_shares(work: Workload, engines: Sequence[str], *, repeats: int, warmup: int = 2) -> Flat:
    """1 - (time that clients took) / (workers x time of the whole round, encoding and the last fold included)."""
    flat: Flat = {}
    with ExitStack() as stack:
        measures = {engine: _measure(stack, work, engine) for engine in engines}
        found: dict[str, list[float]] = {engine: [] for engine in engines}
        for repeat in range(warmup + repeats):
            for engine, measure in measures.items():
                share = measure()
                if repeat >= warmup:
                    found[engine].append(share)
    for engine, shares in found.items():
        flat |= spread_of(f"idle_share_{engine}", shares)
    return flat


def _measure(stack: ExitStack, work: Workload, engine: str) -> Callable[[], float]:
    federation, grid = stack.enter_context(opened(work.on(engine)))
    assert isinstance(grid, PooledGrid)
    one_round = rounds(federation, grid)

    def share() -> float:
        before, start = grid.costs.spent, time.perf_counter()
        one_round()
        busy, whole = grid.costs.spent - before, time.perf_counter() - start
        return 1 - busy / (len(grid.workers()) * whole)

    return share
