"""Contestants that take turns in one run, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from flwr.serverapp import Grid

from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.simulation.engines import open_grid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.server import build_server

Flat = dict[str, float | str]
"""What a benchmark reports: measure -> number, or a word. `x_q1` and `x_q3` are the quartiles of `x`."""


START_S, START_ROUNDS = 5.0, 10
"""A contestant that is started for its turn alone runs so long, or so many rounds, whatever takes less, once it is warm."""
TURN_S = 0.5
"""Rounds of a contestant's turn last so long together. After the others' turns its first one finds the caches cold, as no
round but the first of a real run does."""


@dataclass(frozen=True)
class Measured:
    """Seconds of one round of one contestant, over the repetitions."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The fewest seconds: what a limit is able to do."""
        return min(self.seconds)


Clock = Callable[[], float]
"""Seconds: those that pass (`time.perf_counter`), or those of this process's processors (`time.process_time`)."""


def alternate(
    contestants: Mapping[str, Callable[[], None]],
    *,
    repeats: int,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, Measured]:
    """Time every contestant once per repetition, in turn: seconds of a round, the mean of a turn's rounds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    turn = {name: math.ceil(TURN_S / min(seconds(one) for _ in range(warmup))) for name, one in contestants.items()}
    for _ in range(repeats):
        for name, one_round in contestants.items():
            times[name].append(seconds(one_round, turn[name], clock) / turn[name])
    return {name: Measured(name, tuple(seconds)) for name, seconds in times.items()}


def each_alone(
    contestants: Mapping[str, Callable[[], AbstractContextManager[Callable[[], None]]]], *, starts: int, warmup: int = 3
) -> dict[str, Measured]:
    """Start every contestant in turn, time it while no other one is there, and end it: seconds of a round of each start.

    Contestants that idle beside the one that runs hold memory and caches: with them a bare loop took half as long again.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(starts):
        for name, opened_one in contestants.items():
            with opened_one() as one_round:
                count = max(1, min(START_ROUNDS, math.ceil(START_S / quickest(one_round, warmup))))
                times[name].append(seconds(one_round, count) / count)
    return {name: Measured(name, tuple(seconds)) for name, seconds in times.items()}


def quickest(action: Callable[[], object], repeats: int) -> float:
    """The fewest seconds of several calls."""
    return min(seconds(action) for _ in range(repeats))


def seconds(one_round: Callable[[], object], rounds: int = 1, clock: Clock = time.perf_counter) -> float:
    """Seconds of some calls."""
    start = clock()
    for _ in range(rounds):
        one_round()
    return clock() - start


def spread_of(name: str, values: Sequence[float]) -> Flat:
    """Median and quartiles under their keys."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {name: middle, f"{name}_q1": low, f"{name}_q3": high}


def over(name: str, limit: Measured, measured: Measured) -> Flat:
    """limit/measured over paired repetitions; 1 = as fast as the limit."""
    return spread_of(name, [a / b for a, b in zip(limit.seconds, measured.seconds, strict=True)])


def rounds(federation: Federation, grid: Grid) -> Callable[[], None]:
    """A function that runs one whole round on a Grid: encode, send, train, encode, decode, book, aggregate."""
    server = build_server(federation, Ledger())
    return lambda: server.round(grid, {}, lambda answered, cohort: None)


@contextmanager
def opened(experiment: Experiment) -> Iterator[tuple[Federation, LocalGrid]]:
    """The federation of an experiment as it will be computed here, and its engine."""
    federation = Federation.build(experiment)
    with open_grid(federation) as grid:
        yield federation, grid


@contextmanager
def federation_rounds(experiment: Experiment) -> Iterator[Callable[[], None]]:
    """A function that runs one whole round of an experiment."""
    with opened(experiment) as (federation, grid):
        yield rounds(federation, grid)
