"""Reference implementation of the kernels in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def add_scaled(total: NDArray[np.float64], values: NDArray[np.float32], weight: float, /) -> None:
    """`total += weight * values` in float64, in place; 1-D, equally long."""
    total += np.multiply(values, weight, dtype=np.float64)


def add_sent(
    total: NDArray[np.float64],
    covered: NDArray[np.float64],
    values: NDArray[np.float32],
    sent: NDArray[np.bool_],
    weight: float,
    /,
) -> None:
    """Add scaled values where `sent` is True, and there `covered += weight`. All values are finite."""
    share = np.multiply(sent, weight, dtype=np.float64)
    total += share * values
    covered += share


def add_squares(
    total: NDArray[np.float64], values: NDArray[np.float32], positions: NDArray[np.int64], weight: float, /
) -> None:
    """`total += weight * values[positions] ** 2` in float64, in place.

    Raises:
        IndexError: a position outside the values.
    """
    if len(positions) and positions.min() < 0:  # NumPy would count them from the end
        raise IndexError("a position outside the values")
    total += weight * np.square(values[positions], dtype=np.float64)


def all_finite(values: NDArray[np.float32], /) -> bool:
    """Whether no value of a 1-D array is NaN or infinite."""
    return bool(np.isfinite(values).all())


def moved(
    out: NDArray[np.float32],
    values: NDArray[np.float32],
    base: NDArray[np.float32],
    current: NDArray[np.float32],
    weight: float,
    /,
) -> None:
    """`out = current + weight * (values - base)` in float32, every step rounded; 1-D, equally long."""
    np.subtract(values, base, out=out)
    out *= np.float32(weight)
    out += current


def seed(*key: int) -> int:
    """The first 64 bits of NumPy's `SeedSequence` of a key of 32-bit words.

    Raises:
        OverflowError: a number that is negative or has more than 32 bits.
    """
    return int(np.random.SeedSequence(np.array(key, dtype=np.uint32)).generate_state(1, np.uint64)[0])


def random_bits(seed: int, out: NDArray[np.uint32], /) -> None:
    """Fill `out` with random bits: each number of `PCG64(seed)` is two of them, its lower half first.

    Raises:
        OverflowError: a seed that is negative or has more than 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise OverflowError("a seed has 64 bits")
    drawn = np.random.PCG64(seed).random_raw(-(-len(out) // 2))
    out[:] = drawn.astype("<u8", copy=False).view("<u4")[: len(out)]
