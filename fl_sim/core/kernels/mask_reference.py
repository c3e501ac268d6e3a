"""Reference implementation of the mask coder with contexts, bit after bit in Python.

A mask of an update is not independent bits: whole rows (output channels), channels and kernels are alive together. Four
adaptive probabilities say how likely the next bit is set: of its row so far, of its channel in the rows so far, of its place
in the kernel after the bits before it there, and beside the neighbouring kernels. They are mixed in the logistic domain, by
weights that follow the error of the mix (Mahoney, 2005, "Adaptive weighing of context models for lossless data compression"),
and a binary arithmetic coder takes the bit. Integers only; `_mask_model.h` does the same some hundred times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

SPAN, MOST_SEEN, HEAVIEST = 3072, 255, 1 << 20
NEW = 6
"""How often a probability that was never adapted counts as adapted."""


@dataclass
class _Coder:
    """Binary arithmetic coder of 32 bits: writes to `out`, or reads `data` where `out` is None."""

    data: bytes = b""
    out: bytearray | None = None
    low: int = 0
    high: int = 0xFFFFFFFF
    at: int = 4
    code: int = field(init=False)

    def __post_init__(self) -> None:
        self.code = int.from_bytes(self.data[:4], "big")

    def bit(self, likely: int, bit: int) -> int:
        """Code one bit that is set with probability likely / 65,536. Raises EOFError where the data end."""
        middle = self.low + ((self.high - self.low) * likely >> 16)
        if self.out is None:
            bit = int(self.code <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            if self.out is not None:
                self.out.append(self.high >> 24)
            elif self.at >= len(self.data):
                raise EOFError
            else:
                self.code = (self.code << 8 & 0xFFFFFFFF) | self.data[self.at]
                self.at += 1
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = (self.high << 8 & 0xFFFFFFFF) | 255
        return bit


class _Slot:
    """A probability of 65,536 that a bit is set, and how often it was adapted."""

    __slots__ = ("likely", "seen")

    def __init__(self, likely: int) -> None:
        self.likely, self.seen = likely, NEW

    def adapt(self, bit: int) -> None:
        self.likely += ((65535 if bit else 0) - self.likely) * (131072 // (2 * self.seen + 3)) >> 16
        self.seen = min(MOST_SEEN, self.seen + 1)


@dataclass
class _Model:
    """Weights of the mix, which all tensors of a mask share, and the tables of the logistic function."""

    squash: Sequence[int]
    stretch: Sequence[int]
    coder: _Coder
    weights: list[list[int]] = field(default_factory=lambda: [[52000, 40000, 30000, 30000] for _ in range(8)])

    def bit(self, used: Sequence[_Slot], weights: list[int], base: int, bit: int) -> int:
        """Code one bit under four probabilities, and adapt them and their weights."""
        inputs = [self.stretch[slot.likely >> 4] - base for slot in used]
        mixed = (base * 65536 + sum(w * x for w, x in zip(weights, inputs, strict=True))) >> 16
        likely = self.squash[min(SPAN, max(-SPAN, mixed)) + SPAN]
        bit = self.coder.bit(likely, bit)
        error = bit * 65536 - likely
        for i, (slot, x) in enumerate(zip(used, inputs, strict=True)):
            weights[i] = min(HEAVIEST, max(-HEAVIEST, weights[i] + (x * error >> 14)))
            slot.adapt(bit)
        return bit

    def tensor(self, bits: Bytes, ones: int) -> None:
        """Code the bits of one tensor, (rows, channels, kernel), in place."""
        rows, channels, kernel = bits.shape
        start = min(65528, max(8, (65536 * ones + bits.size // 2) // bits.size))
        base = self.stretch[start >> 4]
        row, channel, place, local = (
            [_Slot(start) for _ in range(n)] for n in (rows, channels, 16 * kernel, 8 * 4 * 2 * 8)
        )
        empty = [0] * kernel
        for r in range(rows):
            last = before = earlier = 0
            for c in range(channels):
                here, above = 0, bits[r - 1, c].tolist() if r else empty
                over, beside, mine = min(7, sum(above)), min(7, before + earlier), bits[r, c].tolist()
                for k in range(kernel):
                    found, up, third = min(3, here), above[k], mine[k - 3] if k >= 3 else 0
                    used = (
                        row[r],
                        channel[c],
                        place[(k * 4 + found) * 4 + last * 2 + third],
                        local[((beside * 4 + found) * 2 + up) * 8 + over],
                    )
                    last = mine[k] = self.bit(used, self.weights[found * 2 + up], base, mine[k])
                    here += last
                bits[r, c] = mine
                earlier, before = before, here

    def mask(self, bits: Bytes, shapes: Numbers, ones: Numbers) -> None:
        """Code all tensors that are neither empty nor full."""
        at = 0
        for shape, count in zip(shapes.reshape(-1, 3).tolist(), ones.tolist(), strict=True):
            size = shape[0] * shape[1] * shape[2]
            if 0 < count < size:
                self.tensor(bits[at : at + size].reshape(shape), count)
            at += size


def _checked(
    bits: Bytes, shapes: Numbers, ones: Numbers, squash: NDArray[np.uint16], stretch: NDArray[np.int16]
) -> None:
    triples = shapes.reshape(-1, 3) if len(shapes) % 3 == 0 else shapes[:0].reshape(-1, 3)
    sizes = triples.prod(axis=1)
    if len(shapes) != 3 * len(ones) or (triples < 0).any() or sizes.sum() != len(bits):
        raise ValueError("three numbers and a count for each tensor, and as many bits as they say")
    if (ones < 0).any() or (ones > sizes).any() or (len(squash), len(stretch)) != (2 * SPAN + 1, 4096):
        raise ValueError("more ones than bits, or tables of another length")


def mask_encode(
    bits: Bytes,
    shapes: Numbers,
    ones: Numbers,
    squash: NDArray[np.uint16],
    stretch: NDArray[np.int16],
    out: Bytes,
    /,
) -> int:
    """Write the code of a mask to the front of `out`; returns its bytes, or -1 where `out` is too short.

    Args:
        bits: 0 or 1 of each coordinate, all tensors one after the other.
        shapes: rows, channels and elements of a kernel of each tensor.
        ones: set bits of each tensor.
        squash: the logistic function of logits -3072..3072 in 1/256, as probabilities of 65,536.
        stretch: its inverse, of probabilities in 1/4096.

    Raises:
        ValueError: arrays that do not fit each other.
    """
    _checked(bits, shapes, ones, squash, stretch)
    coder = _Coder(out=bytearray())
    _Model(squash.tolist(), stretch.tolist(), coder).mask(bits.copy(), shapes, ones)
    assert coder.out is not None
    code = np.frombuffer(bytes(coder.out) + coder.low.to_bytes(4, "big"), dtype=np.uint8)
    if len(code) > len(out):
        return -1
    out[: len(code)] = code
    return len(code)


def mask_decode(
    data: Bytes,
    shapes: Numbers,
    ones: Numbers,
    squash: NDArray[np.uint16],
    stretch: NDArray[np.int16],
    bits: Bytes,
    /,
) -> int:
    """Fill `bits`, all 0 before; 1 where `data` is a code of as many, whatever their ones, else 0. Arguments as `mask_encode`."""
    _checked(bits, shapes, ones, squash, stretch)
    coder = _Coder(data.tobytes())
    if len(data) < 4:
        return 0
    try:
        _Model(squash.tolist(), stretch.tolist(), coder).mask(bits, shapes, ones)
    except EOFError:
        return 0
    return int(coder.at == len(data) and coder.low == coder.code)
