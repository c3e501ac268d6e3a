"""When: round -> density of the prunable weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fl_sim.types import UserError

Schedule = Callable[[int], float]


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise UserError(f"density = {density}: must be above 0 and at most 1")


@dataclass(frozen=True)
class OneShot:
    """Dense before round `at`, `density` from then on."""

    at: int
    density: float

    def __post_init__(self) -> None:
        _check(self.density)

    def __call__(self, number: int) -> float:
        return 1.0 if number < self.at else self.density


@dataclass(frozen=True)
class Cubic:
    """Sparsity s_t = s (1 - (1 - (t - start)/(end - start))^3) between two rounds (Zhu and Gupta, 2017, equation 1)."""

    start: int
    end: int
    density: float

    def __post_init__(self) -> None:
        _check(self.density)

    def __call__(self, number: int) -> float:
        progress = min(1.0, max(0.0, (number - self.start) / max(1, self.end - self.start)))
        return 1.0 - (1.0 - self.density) * (1.0 - (1.0 - progress) ** 3)


@dataclass(frozen=True)
class Iterative:
    """Every `every` rounds from `start`, the share `amount` of what is left goes: density (1 - amount)^k, at least `density`."""

    start: int
    every: int
    amount: float
    density: float

    def __post_init__(self) -> None:
        _check(self.density)

    def __call__(self, number: int) -> float:
        events = 0 if number < self.start else (number - self.start) // self.every + 1
        return max(self.density, (1.0 - self.amount) ** events)
