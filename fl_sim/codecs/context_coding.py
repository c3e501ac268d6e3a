"""A mask bit by bit, in contexts that its own earlier bits make: smaller than independent bits where it is clustered.

Counts of each tensor, LEB128 | code. See `fl_sim.core.kernels.mask_reference` for the contexts and the coder.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.bits import Bits, Reader, varint
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.core.kernels.coding import mask_decode, mask_encode

SPAN, UNIT = 3072, 256
"""Largest logit, and steps of a logit: probabilities between exp(-12) and 1 - exp(-12)."""


class Logistic(NamedTuple):
    """The logistic function and its inverse as tables of integers: both ends have the same, whatever their C library."""

    squash: NDArray[np.uint16]
    stretch: NDArray[np.int16]


@cache
def _logistic() -> Logistic:
    one = 1 << 96
    step = term = one  # exp(1 / 256) by its series
    for n in range(1, 16):
        term //= n * UNIT
        step += term
    odds, squash = one, []
    for _ in range(SPAN + 1):
        squash.append((65536 * odds + (one + odds) // 2) // (one + odds))
        odds = odds * step >> 96
    table = np.array([*(65536 - value for value in reversed(squash[1:])), *squash]).clip(1, 65535)
    stretch = np.searchsorted(table, 16 * np.arange(4096) + 8) - SPAN
    return Logistic(table.astype(np.uint16), stretch.astype(np.int16))


Shapes = tuple[tuple[int, int, int], ...]
"""(rows, channels, elements of a kernel) of each tensor."""


def _ones(flat: Bits, shapes: Shapes) -> list[int]:
    sizes = [rows * channels * kernel for rows, channels, kernel in shapes]
    return [int(np.count_nonzero(part)) for part in np.split(flat, np.cumsum(sizes)[:-1])] if sizes else []


def encode(flat: Bits, shapes: Shapes, most: int) -> bytes | None:
    """The code of a mask; None where it would have more than `most` bytes."""
    ones = _ones(flat, shapes)
    sizes = [rows * channels * kernel for rows, channels, kernel in shapes]
    head = b"".join(varint(count) for count, size in zip(ones, sizes, strict=True) if size)
    out = np.empty(max(0, most - len(head)), dtype=np.uint8)
    size = mask_encode(flat.view(np.uint8), *_arrays(shapes, ones), *_logistic(), out)
    return None if size < 0 else head + out[:size].tobytes()


def decode(reader: Reader, shapes: Shapes) -> Bits:
    """Invert `encode`.

    Raises:
        CorruptPayload: the bytes are no code of a mask of these shapes.
    """
    ones = [
        reader.varint(rows * channels * kernel) if rows * channels * kernel else 0 for rows, channels, kernel in shapes
    ]
    flat = np.zeros(sum(rows * channels * kernel for rows, channels, kernel in shapes), dtype=np.bool_)
    data = np.frombuffer(reader.rest(), dtype=np.uint8)
    if not mask_decode(data, *_arrays(shapes, ones), *_logistic(), flat.view(np.uint8)):
        raise CorruptPayload("the code of a mask is damaged")
    for rows, part, count in zip(shapes, _tensors(flat, shapes), ones, strict=True):
        if count == rows[0] * rows[1] * rows[2]:
            part[:] = True
    if _ones(flat, shapes) != ones:
        raise CorruptPayload("a mask has another number of ones than it says")
    return flat


def _tensors(flat: Bits, shapes: Shapes) -> list[Bits]:
    return np.split(flat, np.cumsum([rows * channels * kernel for rows, channels, kernel in shapes])[:-1])


def _arrays(shapes: Shapes, ones: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.array(shapes, dtype=np.int64).reshape(-1), np.array(ones, dtype=np.int64)
