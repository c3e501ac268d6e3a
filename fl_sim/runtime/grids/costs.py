"""How long clients take: learnt from their own times, and until then expected from their samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Costs:
    """Seconds that a node's work of one kind will take: by its samples (`sizes`), and by its own times as they come in."""

    sizes: Sequence[int]
    _seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    _totals: dict[str, tuple[float, int]] = field(default_factory=dict)

    def learn(self, kind: str, partition: int, seconds: float) -> None:
        """A node took that long: half of that counts, half of what was expected, since one time alone is mostly noise."""
        expected = self.expect(kind, partition) if kind in self._totals else seconds
        self._seconds[kind, partition] = (expected + seconds) / 2
        spent, samples = self._totals.get(kind, (0.0, 0))
        self._totals[kind] = spent + seconds, samples + self._size(partition)

    @property
    def spent(self) -> float:
        """Seconds of all finished tasks, summed."""
        return sum(seconds for seconds, _ in self._totals.values())

    @property
    def longest(self) -> float:
        """Seconds of the slowest node; 0 while nothing was measured."""
        return max(self._seconds.values(), default=0.0)

    def total_seconds(self, kind: str, partitions: Sequence[int]) -> float:
        """Seconds of several nodes one after the other; infinite while nothing of this kind was measured."""
        return sum(self.expect(kind, p) for p in partitions) if kind in self._totals else math.inf

    def expect(self, kind: str, partition: int) -> float:
        """Seconds; while nothing of this kind was measured, samples."""
        known = self._seconds.get((kind, partition))
        if known is not None:
            return known
        spent, samples = self._totals.get(kind, (1.0, 1))
        return self._size(partition) * spent / samples

    def _size(self, partition: int) -> int:
        return self.sizes[partition] if self.sizes else 1
