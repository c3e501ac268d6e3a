"""Reference implementation in NumPy of sums that no addition rounds.

Such a sum is the unrounded sum of some float64 arrays, its *levels*. A number is added to the first level. What that addition
rounds off is itself a float64 (Knuth's TwoSum) and is added to the second, and so on. So the levels depend on the order of the
additions, and what they stand for does not: it is the sum of all numbers, in real arithmetic.

Each function adds from the coordinate `start` on, and returns where a further level is needed, or the end: before that place
everything is added, from there on nothing. Arrays are 1-D and equally long. A level that is not finite takes part in no
further one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Levels = Sequence[NDArray[np.float64]]
CHUNK = 512
"""Coordinates that are added together, or not at all."""


def add_exactly(levels: Levels, numbers: NDArray[np.float64], start: int, /) -> int:
    """Add float64 numbers.

    Raises:
        IndexError: a start outside the numbers.
    """
    end = len(numbers)
    if not 0 <= start <= end:
        raise IndexError("a start outside the numbers")
    with np.errstate(invalid="ignore", over="ignore"):  # of sums that are not finite
        rest = numbers[start:]
        sums = []
        for level in levels:
            sums.append(level[start:] + rest)
            rest = _lost(level[start:], rest, sums[-1])
    left = np.flatnonzero(rest)
    stop = start + int(left[0]) // CHUNK * CHUNK if len(left) else end
    for level, total in zip(levels, sums, strict=True):
        level[start:stop] = total[: stop - start]
    return stop


def add_scaled_exactly(levels: Levels, values: NDArray[np.float32], weight: float, start: int, /) -> int:
    """Add `weight * values`, products in float64."""
    return add_exactly(levels, np.multiply(values, weight, dtype=np.float64), start)


def add_sent_exactly(
    levels: Levels,
    covered: NDArray[np.float64],
    values: NDArray[np.float32],
    sent: NDArray[np.bool_],
    weight: float,
    start: int,
    /,
) -> int:
    """Add `weight * values` where `sent` is True, and there `covered += weight`, a plain sum. All values are finite."""
    share = np.multiply(sent, weight, dtype=np.float64)
    stop = add_exactly(levels, share * values, start)
    covered[start:stop] += share[start:stop]
    return stop


def _lost(a: NDArray[np.float64], b: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """The errors of sums."""
    from_b = total - a
    from_a = total - from_b
    error = (a - from_a) + (b - from_b)
    return np.where(np.isfinite(total), error, 0.0)
