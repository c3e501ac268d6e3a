"""Lossy value types: integers with a scale for each block, signs with one magnitude for each tensor, both entropy-coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs import bits, symbol_coding
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.symbol_coding import Bytes, Code
from fl_sim.codecs.value_coder import Counts, Values

BLOCK = 4096
MOST_CLASSES = 8
FEWEST = 8 * BLOCK
"""Fewer values are not worth more than one table, nor the time to find that out."""


def _block_sizes(counts: Counts) -> NDArray[np.int64]:
    """Values of each block: at most `BLOCK`, never of two tensors; no block for a tensor without values."""
    return np.array([min(BLOCK, n - at) for n in counts for at in range(0, n, BLOCK)], dtype=np.int64)


def _scales(data: memoryview, count: int) -> NDArray[np.float32]:
    """The first `count` float32 of `data`.

    Raises:
        CorruptPayload: they are cut off, not finite, or negative.
    """
    if len(data) < 4 * count:
        raise CorruptPayload("scales are cut off")
    scales = np.frombuffer(data[: 4 * count], dtype="<f4")
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise CorruptPayload("scales must be finite and not negative")
    return scales


def _scaled(whole: NDArray[np.int8], scales: NDArray[np.float32], sizes: NDArray[np.int64]) -> Values:
    with np.errstate(over="ignore"):  # what is not finite is refused with all other values
        restored: Values = whole.astype(np.float32)
        restored *= np.repeat(scales, sizes)
    return restored


def _classes(symbols: Bytes, sizes: NDArray[np.int64]) -> Bytes:
    """A class for each block, by its mean symbol in steps of half an octave: blocks of one class share a table."""
    means = np.add.reduceat(symbols, np.cumsum(sizes) - sizes, dtype=np.int64) / sizes
    levels = np.rint(2 * np.log2(means + 2.0**-6)).astype(np.int64)
    ranks = np.unique(levels, return_inverse=True)[1]
    return (ranks * MOST_CLASSES // max(MOST_CLASSES, int(ranks.max()) + 1)).astype(np.uint8)


def _encode_symbols(symbols: Bytes, sizes: NDArray[np.int64]) -> bytes:
    """classes u8 | with several, the class of each block u8 | code of the symbols, a table for each class."""
    size = len(symbols)
    whole = symbol_coding.single(size)
    if size >= FEWEST:
        classes = _classes(symbols, sizes)
        kinds, contexts = int(classes.max()) + 1, symbol_coding.by_block(classes, sizes)
        counts = symbol_coding.counted(symbols, contexts, kinds)
        together = counts.sum(axis=0, keepdims=True)
        one = Code.of(together)
        if kinds > 1:
            several = Code.of(counts)
            if several.cost_bits(counts) + 8 * len(sizes) < one.cost_bits(together):
                return bytes([kinds]) + classes.tobytes() + symbol_coding.encode(symbols, contexts, kinds, several)
        return b"\1" + symbol_coding.encode(symbols, whole, 1, one)
    return b"\1" + symbol_coding.encode(symbols, whole, 1)


def _decode_symbols(data: memoryview, sizes: NDArray[np.int64], top: int) -> Bytes:
    """Invert `_encode_symbols` for integers -top..top. Raises CorruptPayload."""
    kinds = data[0] if len(data) else 0
    if not 1 <= kinds <= MOST_CLASSES:
        raise CorruptPayload("an impossible number of classes of blocks")
    if kinds == 1:
        return symbol_coding.decode(data[1:], symbol_coding.single(int(sizes.sum())), 1, 2 * top + 1)
    classes = np.frombuffer(data[1 : 1 + len(sizes)], dtype=np.uint8)
    if len(classes) < len(sizes) or classes.max() >= kinds:
        raise CorruptPayload("the classes of blocks are cut off, or one does not exist")
    return symbol_coding.decode(data[1 + len(sizes) :], symbol_coding.by_block(classes, sizes), kinds, 2 * top + 1)


def _folded(whole: NDArray[np.int8]) -> Bytes:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...: what is frequent comes first."""
    return ((whole << 1) ^ (whole >> 7)).view(np.uint8)


def _unfolded(symbols: Bytes) -> NDArray[np.int8]:
    return ((symbols >> 1) ^ (0 - (symbols & 1))).view(np.int8)


@dataclass(frozen=True)
class Rounded:
    """Integers -top..top by stochastic rounding, unbiased (QSGD; Alistarh et al., 2017), each block of values by its scale.

    A block is 4,096 values of one tensor or what is left of it; its scale is a float32. The integers are entropy-coded:
    the fewer values there are, the fewer bits each takes.

    Attributes:
        id: number on the wire.
        top: the largest integer.
        counts: values of each tensor, known to both ends; empty = all values are one tensor's.
    """

    id: int
    top: int
    counts: Counts = ()

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        sizes = _block_sizes(self.counts or (len(values),))
        largest = np.maximum.reduceat(np.abs(values), np.cumsum(sizes) - sizes)
        scales = (largest / self.top).astype("<f4")
        safe = np.where(scales > 0, scales, 1).astype(np.float32)
        noise = np.random.default_rng(seed).random(len(values), dtype=np.float32)
        whole = np.clip(np.floor(values / np.repeat(safe, sizes) + noise), -self.top, self.top).astype(np.int8)
        head: bytes = scales.tobytes()
        return head + _encode_symbols(_folded(whole), sizes)

    def decode(self, data: memoryview, count: int) -> Values:
        if count == 0:
            return _nothing(data)
        sizes = _block_sizes(self.counts or (count,))
        scales = _scales(data, len(sizes))
        symbols = _decode_symbols(data[4 * len(sizes) :], sizes, self.top)
        return _scaled(_unfolded(symbols), scales, sizes)


def _nothing(data: memoryview) -> Values:
    if len(data):
        raise CorruptPayload("values where none are due")
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class Signs:
    """The sign of each value, times one magnitude for each tensor: the mean over its values that are not 0; 0 stays 0.

    Scaled signs (Karimireddy et al., 2019, "Error feedback fixes SignSGD", section 4). Biased: a run needs error feedback.

    Attributes:
        id: number on the wire.
        counts: values of each tensor, known to both ends; empty = all values are one tensor's.
    """

    id: int
    counts: Counts = ()

    def _sizes(self, count: int) -> NDArray[np.int64]:
        return np.array([n for n in self.counts or (count,) if n], dtype=np.int64)

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        sizes = self._sizes(len(values))
        starts = np.cumsum(sizes) - sizes
        # The mean of magnitudes up to the largest float32 is one of float64.
        sums = np.add.reduceat(np.abs(values), starts, dtype=np.float64)
        counts = np.add.reduceat(values != 0, starts, dtype=np.int64)
        scales: bytes = (sums / np.maximum(counts, 1)).astype("<f4").tobytes()
        return scales + _encode_symbols(_folded(np.sign(values).astype(np.int8)), sizes)

    def decode(self, data: memoryview, count: int) -> Values:
        if count == 0:
            return _nothing(data)
        sizes = self._sizes(count)
        scales = _scales(data, len(sizes))
        symbols = _decode_symbols(data[4 * len(sizes) :], sizes, 1)
        return _scaled(_unfolded(symbols), scales, sizes)


@dataclass(frozen=True)
class Largest:
    """The largest of every `one_in` values of a tensor, at entropy-coded positions; the others arrive as 0.

    Unlike a mask it says nothing of what is pruned. With signs it is sparse ternary compression (Sattler et al., 2019,
    "Robust and communication-efficient federated learning from non-iid data", algorithm 1), of each tensor by itself.
    Bytes: length of the positions (LEB128), positions, values.

    Attributes:
        id: number on the wire.
        one_in: of so many values of a tensor one is sent, rounded up.
        inner: how what is sent is coded.
        counts: values of each tensor, known to both ends; empty = all values are one tensor's.
    """

    id: int
    one_in: int
    inner: Rounded | Signs
    counts: Counts = ()

    def _kept(self, counts: Counts) -> tuple[Counts, Rounded | Signs]:
        """Counts of values sent of each tensor, and their coder."""
        kept = tuple(-(-count // self.one_in) for count in counts)
        return kept, replace(self.inner, counts=kept)

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        counts = self.counts or (len(values),)
        kept, inner = self._kept(counts)
        chosen = [_largest(part, keep) for part, keep in zip(_by_tensor(values, counts), kept, strict=True)]
        _, words = bits.encode(chosen)
        return b"".join([bits.varint(len(words)), words, inner.encode(values[np.concatenate(chosen)], seed)])

    def decode(self, data: memoryview, count: int) -> Values:
        if count == 0:
            return _nothing(data)
        restored = np.zeros(count, dtype=np.float32)
        counts = self.counts or (count,)
        kept, inner = self._kept(counts)
        reader = bits.Reader(data)
        start = reader.varint(len(data)) + reader.at
        chosen = bits.decode(data[reader.at : start], list(zip(kept, counts, strict=True)))
        restored[np.concatenate(chosen)] = inner.decode(data[start:], sum(kept))
        return restored


def _by_tensor(values: Values, counts: Counts) -> Sequence[Values]:
    return np.split(values, np.cumsum(counts)[:-1])


def _largest(values: Values, keep: int) -> NDArray[np.bool_]:
    """Positions of the `keep` largest magnitudes; of equal ones the first, so that bytes do not depend on how a machine sorts."""
    chosen = np.zeros(len(values), dtype=np.bool_)
    chosen[np.argsort(-np.abs(values), kind="stable")[:keep]] = True
    return chosen
