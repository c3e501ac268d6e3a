"""Lossy value types: integers with a scale for each block, signs with one magnitude for each tensor, both entropy-coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs import bits, symbol_coding
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.symbol_coding import Bytes, Code
from fl_sim.codecs.value_coder import Counts, Values
from fl_sim.core.kernels import random_bits
from fl_sim.core.kernels.coding import block_sums, round_blocks, scale_blocks

Sizes = NDArray[np.int64]
BLOCK = 4096
RUN = 256
MOST_CLASSES = 8
MANY = 16
FEWEST = 8 * BLOCK
"""Fewer values are not worth more than one table, nor the time to find that out."""


def _cut(counts: Counts, most: int) -> Sizes:
    """Values of each block: at most `most`, never of two tensors; no block for a tensor without values."""
    sizes = np.asarray(counts, dtype=np.int64)
    blocks = -(-sizes // most)
    cut = np.full(int(blocks.sum()), most, dtype=np.int64)
    cut[(np.cumsum(blocks) - 1)[sizes > 0]] = (sizes - (blocks - 1) * most)[sizes > 0]
    return cut


@lru_cache(maxsize=64)
def _blocks(counts: Counts) -> Sizes:
    """Values of each block that has a scale; clients of one model have the same. Not to be changed."""
    return _cut(counts, BLOCK)


@lru_cache(maxsize=64)
def _runs(counts: Counts) -> Sizes:
    """Values of each run that has a class. Not to be changed."""
    return _cut(counts, RUN)


def _told_scales(scales: NDArray[np.float32]) -> tuple[bytes, bytes]:
    """(head, rider): of many scales the exponents are coded, with their bytes (LEB128) first, and 3 bytes of each ride."""
    words = scales.astype("<f4").view("<u4")
    if len(words) < MANY:
        return b"", words.tobytes()
    exponents = (words >> 23).astype(np.uint8)
    rest = np.ascontiguousarray((words & 0x7FFFFF).view(np.uint8).reshape(-1, 4)[:, :3])
    return _told(exponents), rest.tobytes()


def _head_of_scales(data: memoryview, count: int) -> tuple[Bytes | None, int, int]:
    """(exponents or None, where the head ends, bytes of the rider) of so many scales. Raises CorruptPayload."""
    if count < MANY:
        return None, 0, 4 * count
    exponents, at = _heard(data, count, symbol_coding.ALPHABET)
    return exponents, at, 3 * count


def _scales(exponents: Sequence[Bytes | None], riders: Sequence[memoryview | bytes]) -> NDArray[np.float32]:
    """Scales of several clients, one after the other. Raises CorruptPayload where one is not finite, or negative."""
    rider, told = b"".join(riders), [each for each in exponents if each is not None]
    if not told:
        scales = np.frombuffer(rider, dtype="<f4").astype(np.float32)
    else:
        joined = np.concatenate(told)
        words = np.zeros((len(joined), 4), dtype=np.uint8)
        words[:, :3] = np.frombuffer(rider, dtype=np.uint8).reshape(-1, 3)
        if (words[:, 2] > 0x7F).any():
            raise CorruptPayload("the mantissa of a scale is too long")
        scales = (words.view("<u4")[:, 0] | joined.astype(np.uint32) << 23).view(np.float32)
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise CorruptPayload("scales must be finite and not negative")
    return scales


def _decode_all(data: Sequence[memoryview], counts: Counts, sizes: Sizes, top: int) -> Values:
    """Values of several clients, (clients, values), of integers -top..top in blocks of these sizes. Raises CorruptPayload."""
    symbols: Bytes = np.empty((len(data), sum(counts)), dtype=np.uint8)
    exponents, riders = list[Bytes | None](), list[memoryview | bytes]()
    contexts = symbol_coding.single(symbols.shape[1])
    for each, row in zip(data, symbols, strict=True):
        told, at, length = _head_of_scales(each, len(sizes))
        riders.append(_decode_symbols(each[at:], counts, top, length, contexts, row))
        exponents.append(told)
    values: Values = np.empty(symbols.shape, dtype=np.float32)
    scales = _scales(exponents, riders)
    # What is not finite is refused with all values.
    blocks = np.tile(sizes, len(data)) if len(data) > 1 else sizes
    scale_blocks(symbols.reshape(-1), scales, blocks, values.reshape(-1))
    return values


def _classes(symbols: Bytes, runs: Sizes) -> Bytes:
    """A class for each run, by its mean symbol in steps of half an octave: runs of one class share a table."""
    sums = np.empty(len(runs), dtype=np.int64)
    block_sums(symbols, runs, sums)
    levels = np.rint(2 * np.log2(sums / runs + 2.0**-6)).astype(np.int64)
    levels -= levels.min()
    occurs = np.zeros(int(levels.max()) + 1, dtype=np.int64)
    occurs[levels] = 1
    ranks = np.cumsum(occurs)
    class_of: Bytes = ((ranks - 1) * MOST_CLASSES // max(MOST_CLASSES, int(ranks[-1]))).astype(np.uint8)
    classes: Bytes = class_of[levels]
    return classes


def _told(symbols: Bytes) -> bytes:
    """Bytes of the code (LEB128), and the code, of a few symbols."""
    code = symbol_coding.encode(symbols, symbol_coding.single(len(symbols)), 1)
    return bits.varint(len(code)) + code


def _heard(data: memoryview, count: int, alphabet: int) -> tuple[Bytes, int]:
    """Invert `_told`: (symbols, where they end). Raises CorruptPayload."""
    reader = bits.Reader(data)
    end = reader.varint(len(data)) + reader.at
    return symbol_coding.decode(data[reader.at : end], symbol_coding.single(count), 1, alphabet), end


def _cost(counts: NDArray[np.int64]) -> float:
    """Predicted bits of symbols that occur so often in each class, and of their tables."""
    totals, used = counts.sum(axis=1), counts[counts > 0]
    return float((totals * np.log2(totals)).sum() - (used * np.log2(used)).sum()) + 8 * len(used) + 16 * len(totals)


def _encode_symbols(symbols: Bytes, sizes: Counts, rider: bytes) -> bytes:
    """classes u8 | with several, bytes (LEB128) and code of the class of each run | code of the symbols, a table a class."""
    size = len(symbols)
    if size < FEWEST:
        return b"\1" + symbol_coding.encode(symbols, symbol_coding.single(size), 1, rider=rider)
    runs = _runs(sizes)
    classes = _classes(symbols, runs)
    counts = symbol_coding.counted(symbols, symbol_coding.by_block(classes, runs), int(classes.max()) + 1)
    best = counts.sum(axis=0, keepdims=True), b"", np.zeros_like(classes)
    least = _cost(best[0])
    while len(counts) > 1:
        if (cost := _cost(counts)) < least:  # else the classes themselves need not be coded to find out
            told = _told(classes)
            cost += 8 * len(told)
            if cost < least:
                best, least = (counts, told, classes), cost
        # Pairs of neighbours together.
        classes, counts = classes // 2, np.add.reduceat(counts, np.arange(0, len(counts), 2))
    counts, told, classes = best
    contexts, code = symbol_coding.by_block(classes, runs), Code.of(counts, size)
    coded = symbol_coding.encode(symbols, contexts, len(counts), code, rider)
    return b"".join([bytes([len(counts)]), told, coded])


def _decode_symbols(
    data: memoryview, sizes: Counts, top: int, rider: int, contexts: Bytes, symbols: Bytes
) -> memoryview | bytes:
    """Invert `_encode_symbols` for integers -top..top: fill `symbols`, return the rider. `contexts` are those of one class.
    Raises CorruptPayload."""
    kinds = data[0] if len(data) else 0
    if not 1 <= kinds <= MOST_CLASSES:
        raise CorruptPayload("an impossible number of classes of runs")
    at = 1
    if kinds > 1:
        runs = _runs(sizes)
        classes, end = _heard(data[1:], len(runs), kinds)
        contexts, at = symbol_coding.by_block(classes, runs), 1 + end
    return symbol_coding.with_rider(data[at:], contexts, kinds, 2 * top + 1, rider, symbols)[1]


def _draw(seed: int, bits: NDArray[np.uint32]) -> None:
    """Random bits of which `Generator.random` of float32 makes its numbers."""
    try:
        random_bits(seed, bits)
    except OverflowError:  # a number of several words, which NumPy takes
        drawn = np.random.PCG64(seed).random_raw(-(-len(bits) // 2))
        bits[:] = drawn.astype("<u8", copy=False).view("<u4")[: len(bits)]


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
        return self.encode_all(values[np.newaxis], (seed,))[0]

    def encode_all(self, values: Values, seeds: Sequence[int]) -> list[bytes]:
        """`encode` of several clients' values, (clients, values), each with its seed."""
        clients, size = values.shape
        if not size:
            return [b""] * clients
        counts = self.counts or (size,)
        sizes = _blocks(counts)
        largest = np.maximum.reduceat(np.abs(values), np.cumsum(sizes) - sizes, axis=1)
        scales = (largest / self.top).astype(np.float32)
        units = np.where(scales > 0, scales, 1).astype(np.float32)
        noise, symbols = np.empty((clients, size), dtype=np.uint32), np.empty((clients, size), dtype=np.uint8)
        for seed, row in zip(seeds, noise, strict=True):
            _draw(seed, row)
        flat, blocks = np.ascontiguousarray(values).reshape(-1), np.tile(sizes, clients)
        round_blocks(flat, noise.reshape(-1), units.reshape(-1), blocks, self.top, symbols.reshape(-1))
        told = map(_told_scales, scales)
        return [head + _encode_symbols(row, counts, rider) for row, (head, rider) in zip(symbols, told, strict=True)]

    def decode(self, data: memoryview, count: int) -> Values:
        values: Values = self.decode_all((data,), count)[0]
        return values

    def decode_all(self, data: Sequence[memoryview], count: int) -> Values:
        """See `Together`."""
        if count == 0:
            return _nothing(*data)
        counts = self.counts or (count,)
        return _decode_all(data, counts, _blocks(counts), self.top)


def _nothing(*data: memoryview) -> Values:
    """No values of several clients."""
    if any(map(len, data)):
        raise CorruptPayload("values where none are due")
    return np.zeros((len(data), 0), dtype=np.float32)


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
        return self.encode_all(values[np.newaxis], (seed,))[0]

    def encode_all(self, values: Values, seeds: Sequence[int]) -> list[bytes]:
        """`encode` of several clients' values, (clients, values)."""
        clients, size = values.shape
        if not size:
            return [b""] * clients
        sizes = self._sizes(size)
        starts = np.cumsum(sizes) - sizes
        # The mean of magnitudes up to the largest float32 is one of float64.
        sums = np.add.reduceat(np.abs(values), starts, axis=1, dtype=np.float64)
        counts = np.add.reduceat(values != 0, starts, axis=1, dtype=np.int64)
        told = map(_told_scales, (sums / np.maximum(counts, 1)).astype(np.float32))
        symbols: Bytes = (values < 0).view(np.uint8) | (values > 0).view(np.uint8) << np.uint8(1)
        whole = self.counts or (size,)
        return [head + _encode_symbols(row, whole, rider) for row, (head, rider) in zip(symbols, told, strict=True)]

    def decode(self, data: memoryview, count: int) -> Values:
        values: Values = self.decode_all((data,), count)[0]
        return values

    def decode_all(self, data: Sequence[memoryview], count: int) -> Values:
        """See `Together`."""
        if count == 0:
            return _nothing(*data)
        return _decode_all(data, self.counts or (count,), self._sizes(count), 1)


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
            nothing: Values = _nothing(data)[0]
            return nothing
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
    sizes = np.abs(values)
    if keep == len(sizes):
        return np.ones(keep, dtype=np.bool_)
    least = np.partition(sizes, len(sizes) - keep)[len(sizes) - keep]
    chosen: NDArray[np.bool_] = sizes > least
    chosen[np.flatnonzero(sizes == least)[: keep - np.count_nonzero(chosen)]] = True
    return chosen
