"""Sums of float64 numbers that no addition rounds: whatever the order and the grouping of the additions, the total is the same.

The sum at a coordinate is the unrounded sum of some float64 numbers, its levels (`fl_sim.core.kernels.exact_reference`). The
first level alone is what a plain float64 sum would be, and nearly always all there is: products of float32 values and counts
have some 30 bits, a float64 has 53. Where the values of one coordinate lie many powers of two apart, the second level holds
what the first could not. A further one is made when it is needed.

There are few: all numbers are multiples of 2^-149, the least float32, and below 2^159, the largest times a count below 2^31. An
addition loses at most 2^-53 of its sum, so that n additions leave each level at most n 2^-53 of the one above: 8 levels hold
the sum of a thousand numbers, and 12 that of 2^24. Squares are multiples of 2^-298 and below 2^287: 14 and 22 levels, fewer than
the 29 that the compiled loops take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.kernels import add_squares
from fl_sim.core.kernels.exact import add_exactly, add_scaled_exactly, add_sent_exactly
from strategies.accumulators import Accumulator

Part = NDArray[np.float64]
Add = Callable[[Sequence[Part], slice, int], int]
"""(levels at a place, the place, where to begin in it) -> where a further level is needed, or the place's length."""


@dataclass(frozen=True)
class ExactSum:
    """The sums at `size` coordinates.

    Attributes:
        levels: the first one, and those that were needed.
        folder: where levels of a large model lie; None = in memory.
    """

    levels: list[Accumulator]
    folder: Path | None = None

    @classmethod
    def zeros(cls, size: int, folder: Path | None = None) -> ExactSum:
        """Sums of nothing.

        Raises:
            OSError: the folder cannot be written.
        """
        return cls([Accumulator.zeros(size, folder)], folder)

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.levels[0].size

    def add_scaled(self, values: NDArray[np.float32], weight: float) -> None:
        """Add `weight * values`; products are rounded to float64.

        Raises:
            OSError: the disk is full.
        """
        first, done = self.levels[0].array, 0
        if first is not None and len(self.levels) == 1:  # as nearly always
            done = add_scaled_exactly([first], values, weight, 0)
        if done < self.size:
            self._add(lambda parts, place, start: add_scaled_exactly(parts, values[place], weight, start), done)

    def add_sent(
        self, covered: Accumulator, values: NDArray[np.float32], sent: NDArray[np.bool_], weight: float
    ) -> None:
        """Add `weight * values` where they were sent, and there the weight to what `covered` sums up.

        Raises:
            OSError: the disk is full.
        """
        counts = covered.pieces()
        place, count = next(counts)

        def add(parts: Sequence[Part], at: slice, start: int) -> int:
            nonlocal place, count
            if at != place:
                place, count = next(counts)
            return add_sent_exactly(parts, count, values[at], sent[at], weight, start)

        self._add(add)
        next(counts, None)  # the last piece is put back

    def add_squares(self, values: NDArray[np.float32], positions: NDArray[np.int64], weight: float) -> None:
        """Add `weight * values[positions] ** 2`; products are rounded to float64."""
        numbers = np.zeros(len(positions))
        add_squares(numbers, values, positions, weight)
        self._add(lambda parts, place, start: add_exactly(parts, numbers[place], start))

    def merge(self, other: ExactSum) -> None:
        """Add all that another one of the same size sums up.

        Raises:
            OSError: the disk is full.
        """
        for level in other.levels:

            def add(parts: Sequence[Part], place: slice, start: int, level: Accumulator = level) -> int:
                return add_exactly(parts, level.part(place), start)

            self._add(add)

    def _add(self, add: Add, start: int = 0) -> None:
        first, folder = self.levels[0], self.folder
        for place, top in first.pieces():
            parts = [top, *(level.part(place) for level in self.levels[1:] if level.in_memory)]
            done, start = add(parts, place, start), 0
            while done < len(top):
                if len(parts) == len(self.levels):
                    self.levels.append(Accumulator.zeros(self.size, folder))
                parts.append(self.levels[len(parts)].part(place))
                done = add(parts, place, done)
            for level, part in zip(self.levels[1:], parts[1:], strict=False):
                level.put(place, part)

    def totals(self) -> Iterator[tuple[slice, Part]]:
        """Consecutive parts of the sums with their places, each sum rounded once to float64; the sums are used up."""
        for place, top in self.levels[0].pieces(keep=False):
            yield place, _rounded([top, *(level.part(place) for level in self.levels[1:])])


def _rounded(levels: Sequence[Part]) -> Part:
    """The sums of levels in the memory of the first, correctly rounded: one addition rounds once, more than one do not."""
    top, *rest = levels
    if not rest:
        return top
    second, *more = rest
    several = np.zeros(len(top), dtype=bool)
    for level in more:
        several |= level != 0
    exact = {place: math.fsum(level[place] for level in levels) for place in np.flatnonzero(several).tolist()}
    top += second
    for place, total in exact.items():
        top[place] = total
    return top
