"""Reference implementation of integers by stochastic rounding, block by block, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


def _require_blocks(numbers: Floats | Numbers, sizes: Numbers, total: int) -> None:
    if len(numbers) != len(sizes) or (sizes < 0).any() or sizes.sum() != total:
        raise ValueError("a number for each block, and as many elements as the blocks have")


def round_blocks(
    values: Floats, noise: NDArray[np.uint32], units: Floats, sizes: Numbers, top: int, symbols: Bytes, /
) -> None:
    """Integers by stochastic rounding: floor(value / unit + u) with u uniform in [0, 1), cut at -top and top.

    Args:
        values: finite, all blocks one after the other.
        noise: 32 random bits of each value; u is made of the upper 24.
        units: of each block, above 0.
        sizes: values of each block.
        top: at most 127.
        symbols: receives 0, 1, 2, 3, ... for 0, -1, 1, -2, ...: what is frequent comes first.
    """
    if not len(values) == len(noise) == len(symbols):
        raise ValueError("expected arrays of equal length")
    _require_blocks(units, sizes, len(values))
    if not 1 <= top <= 127:
        raise ValueError("integers of at most 127")
    share = (noise >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    whole = np.clip(np.floor(values / np.repeat(units, sizes) + share), -top, top).astype(np.int8)
    symbols[:] = ((whole << 1) ^ (whole >> 7)).view(np.uint8)


def scale_blocks(symbols: Bytes, units: Floats, sizes: Numbers, values: Floats, /) -> None:
    """Invert `round_blocks` up to its rounding: `values` receives each integer times the unit of its block."""
    if len(symbols) != len(values):
        raise ValueError("expected arrays of equal length")
    _require_blocks(units, sizes, len(symbols))
    whole = ((symbols >> 1) ^ (0 - (symbols & 1))).view(np.int8)
    with np.errstate(over="ignore"):
        values[:] = whole.astype(np.float32) * np.repeat(units, sizes)


def block_sums(symbols: Bytes, sizes: Numbers, sums: Numbers, /) -> None:
    """The sum of each block's symbols."""
    _require_blocks(sums, sizes, len(symbols))
    until = np.append(0, np.cumsum(symbols, dtype=np.int64))
    ends = np.cumsum(sizes)
    sums[:] = until[ends] - until[ends - sizes]
