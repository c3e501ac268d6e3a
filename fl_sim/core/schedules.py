"""Schedules: round -> density of the prunable weights, or any other number that changes with the round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fl_sim.core.types import UserError

Schedule = Callable[[int], float]


def _check(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(f"{name} = {share}: must be above 0 and at most 1")


@dataclass(frozen=True)
class Constant:
    """Constant schedule: the same value in every round."""

    density: float

    def __post_init__(self) -> None:
        _check("density", self.density)

    def __call__(self, number: int) -> float:
        return self.density


@dataclass(frozen=True)
class OneShot:
    """Dense before round `at`, `density` from then on."""

    at: int
    density: float

    def __post_init__(self) -> None:
        _check("density", self.density)

    def __call__(self, number: int) -> float:
        return 1.0 if number < self.at else self.density


@dataclass(frozen=True)
class _Gradual:
    """From dense, in rounds up to `start`, to `density`, in rounds from `end`."""

    start: int
    end: int
    density: float

    def __post_init__(self) -> None:
        _check("density", self.density)
        if self.end < self.start:
            raise UserError(f"end = {self.end}: must not be before start = {self.start}")

    def _progress(self, number: int) -> float:
        return min(1.0, max(0.0, (number - self.start) / max(1, self.end - self.start)))


@dataclass(frozen=True)
class Linear(_Gradual):
    """Linear schedule: the same number of weights is pruned in every round."""

    def __call__(self, number: int) -> float:
        return 1.0 - (1.0 - self.density) * self._progress(number)


@dataclass(frozen=True)
class Cubic(_Gradual):
    """Sparsity s (1 - (1 - (t - start)/(end - start))^3) between two rounds (Zhu and Gupta, 2017, equation 1)."""

    def __call__(self, number: int) -> float:
        return 1.0 - (1.0 - self.density) * (1.0 - (1.0 - self._progress(number)) ** 3)


@dataclass(frozen=True)
class Exponential(_Gradual):
    """Exponential schedule: the same share of the remaining weights is pruned in every round, density^progress."""

    def __call__(self, number: int) -> float:
        return float(self.density ** self._progress(number))


@dataclass(frozen=True)
class Iterative:
    """Every `every` rounds from `start`, the share `amount` of what is left goes: density (1 - amount)^k.

    The iterations of RD pruning, arXiv 2308.10438: with amount = 0.2, 14 of them leave 4.4 %, or `density` where that is more.
    """

    start: int
    every: int
    amount: float
    density: float

    def __post_init__(self) -> None:
        _check("density", self.density)
        if not 0 < self.amount < 1:
            raise UserError(f"amount = {self.amount}: must be above 0 and below 1")
        if self.every < 1:
            raise UserError(f"every = {self.every}: must be at least 1 round")

    def __call__(self, number: int) -> float:
        events = 0 if number < self.start else (number - self.start) // self.every + 1
        return max(self.density, (1.0 - self.amount) ** events)


@dataclass(frozen=True)
class Cosine:
    """From `first` in round 0 along half a cosine to 0 in round `end`: RigL's exchanged fraction (Evci et al., 2020)."""

    first: float
    end: int

    def __post_init__(self) -> None:
        _check("first", self.first)
        if self.end < 1:
            raise UserError(f"end = {self.end}: must be at least 1")

    def __call__(self, number: int) -> float:
        return self.first / 2 * (1 + math.cos(math.pi * min(1.0, max(0, number) / self.end)))
