"""Reference implementation of the mask coder with contexts, bit after bit in Python.

A mask of an update is not independent bits: whole rows (output channels), channels and kernels are alive together. First comes
whether a kernel is live, that is has any bit set, then the bits of the live ones; a linear layer's kernels have one element.
Four adaptive probabilities say how likely the next bit is set. Of a kernel being live: that of its row so far, of its channel
in the rows so far, of both levels together, and beside its neighbours. Of a bit in a live kernel: those of row and channel, of
the bits before it in the kernel, and beside the same place in the neighbours. They are mixed in the logistic domain, by weights
that follow the error of the mix (Mahoney, 2005, "Adaptive weighing of context models for lossless data compression"), and a
binary arithmetic coder takes the bit. What both levels, neighbours and earlier bits say is shared by all tensors, as a distance
to the share of each tensor. Integers only; `_mask_model.h` does the same some hundred times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

SPAN, MOST_SEEN, HEAVIEST, LEARN = 3072, 255, 1 << 20, 13
NEW = 6
"""How often a probability that was never adapted counts as adapted."""
FIRST_WEIGHT, FIRST_RATIO, LEVELS = 20000, 512, 16


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


def _slots(count: int, likely: int = 32768) -> list[_Slot]:
    return [_Slot(likely) for _ in range(count)]


@dataclass
class _Model:
    """What all tensors of a mask share: weights of the mix, probabilities around a base, and the logistic function.

    Attributes:
        live_base, bit_base: logits of the share of live kernels, and of set bits in these, of the tensor at hand.
        ratio: 256 times the set bits of a kernel over its odds of being live, of the tensors so far.
    """

    squash: Sequence[int]
    stretch: Sequence[int]
    coder: _Coder
    weights: list[list[int]] = field(default_factory=lambda: [[FIRST_WEIGHT] * 4 for _ in range(80)])
    joint: list[_Slot] = field(default_factory=lambda: _slots(LEVELS * LEVELS))
    near: list[_Slot] = field(default_factory=lambda: _slots(256))
    pattern: list[_Slot] = field(default_factory=lambda: _slots(512))
    beside: list[_Slot] = field(default_factory=lambda: _slots(256))
    live_base: int = 0
    bit_base: int = 0
    ratio: int = FIRST_RATIO

    def apart(self, slot: _Slot, base: int) -> int:
        return self.stretch[slot.likely >> 4] - base

    def squashed(self, logit: int) -> int:
        return self.squash[min(SPAN, max(-SPAN, logit)) + SPAN]

    def bit(self, used: Sequence[_Slot], weights: list[int], base: int, bit: int) -> int:
        """Code one bit under four probabilities, and adapt them and their weights."""
        inputs = [self.apart(slot, base) for slot in used]
        likely = self.squashed((base * 65536 + sum(w * x for w, x in zip(weights, inputs, strict=True))) >> 16)
        bit = self.coder.bit(likely, bit)
        error = bit * 65536 - likely
        for i, (slot, x) in enumerate(zip(used, inputs, strict=True)):
            weights[i] = min(HEAVIEST, max(-HEAVIEST, weights[i] + (x * error >> LEARN)))
            slot.adapt(bit)
        return bit

    def level(self, slot: _Slot) -> int:
        """How far a row or channel is from the share of its tensor, in steps of half a logit."""
        return min(LEVELS - 1, max(0, (self.apart(slot, self.live_base) >> 7) + LEVELS // 2))

    def kernel(
        self, bits: list[int], above: Sequence[int], left: Sequence[int], lines: Sequence[_Slot], around: int
    ) -> int:
        """Code the bits of a live kernel in place, given those of its neighbours; how many are set."""
        found = last = 0
        for k in range(len(bits)):
            if not found and k == len(bits) - 1:
                bits[k] = 1
                return 1
            some, place = min(3, found), min(k, 8)
            row, channel = lines[found > 0], lines[2 + (found > 0)]
            beside = self.beside[((above[k] * 2 + left[k]) * 16 + around) * 4 + some]
            used = (row, channel, self.pattern[1 << place | last], beside)
            bits[k] = self.bit(used, self.weights[16 + some * 16 + min(k, 15)], self.bit_base, bits[k])
            found += bits[k]
            last = (last | bits[k] << place) & 0xFF
        return found

    def tensor(self, bits: Bytes, ones: int) -> int:
        """Code the bits of one tensor, (rows, channels, kernel), in place; how many of its kernels are live."""
        rows, channels, kernel = bits.shape
        starts = [self.squash[base + SPAN] for base in (self.live_base, self.bit_base, self.bit_base)]
        row, channel = ([[_Slot(start) for start in starts] for _ in range(n)] for n in (rows, channels))
        empty, counts, live = [0] * kernel, [0] * (channels + 2), 0
        for r in range(rows):
            above, counts = counts, [0] * (channels + 2)
            over_bits = bits[r - 1].tolist() if r else [empty] * channels
            left = empty
            for c in range(channels):
                beside, over = min(3, counts[c - 1]), min(3, above[c])
                near = (beside * 4 + over) * 16 + min(3, counts[c - 2]) * 4 + min(3, above[c + 1])
                joint = self.level(row[r][0]) * LEVELS + self.level(channel[c][0])
                used = (row[r][0], channel[c][0], self.joint[joint], self.near[near])
                mine = bits[r, c].tolist()
                found = self.bit(used, self.weights[beside * 4 + over], self.live_base, int(any(mine)))
                live += found
                if found and kernel > 1:
                    lines = (*row[r][1:], *channel[c][1:])
                    found = self.kernel(mine, over_bits[c], left, lines, over * 4 + beside)
                else:
                    mine[0] = found
                bits[r, c] = left = mine
                counts[c] = found
                ones -= found
                if not ones:
                    return live
        return live

    def logit(self, likely: int) -> int:
        return self.stretch[min(65528, max(8, likely)) >> 4]

    def turn(self, kernels: int, kernel: int, ones: int) -> None:
        """Turn to a tensor: what share of its kernels is probably live, and what share of a live kernel's bits is set."""
        live = 16777216 * ones // (256 * ones + self.ratio * kernels) if kernel > 1 else 65536 * ones // kernels
        live_base, bit_base = self.logit(live), self.bit_base
        if kernel > 1:
            bit_base = self.logit(65536 * ones // (1 + live * kernels // 65536) // kernel)
        for slots, by in (
            (self.joint + self.near, live_base - self.live_base),
            (self.pattern + self.beside, bit_base - self.bit_base),
        ):
            for slot in slots:
                slot.likely = self.squashed(self.apart(slot, -by))
        self.live_base, self.bit_base = live_base, bit_base

    def mask(self, bits: Bytes, shapes: Numbers, ones: Numbers) -> None:
        """Code all tensors that are neither empty nor full."""
        at = 0
        for (rows, channels, kernel), count in zip(shapes.reshape(-1, 3).tolist(), ones.tolist(), strict=True):
            kernels, size = rows * channels, rows * channels * kernel
            if 0 < count < size:
                self.turn(kernels, kernel, count)
                live = self.tensor(bits[at : at + size].reshape(rows, channels, kernel), count)
                if kernel > 1:
                    self.ratio = (self.ratio + 256 * count * (kernels - live) // (kernels * max(1, live)) + 1) // 2
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
