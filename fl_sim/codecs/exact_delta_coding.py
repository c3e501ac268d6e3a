"""float32 values as changes of the values that the receiver holds, exact for every float.

    detail u8 | bins below the scale u16 | number of scales with tables of their own u8 | these, u8 each | scale of each tensor
    u8 | bytes of the symbols, LEB128 | symbols | of at most 65,536 values of one tensor together: signs, zeros up to a byte,
    then places, zeros up to a byte

A change is cut into its bin, which is entropy-coded, and its place among the floats of that bin, which is as good as random
and travels as it is (`fl_sim.core.kernels.change_reference`). `w0 + (w1 - w0)` misses up to some percent of the float32
values `w1`; counting floats misses none, NaN and -0 included.

The same change is many units in the last place of a small weight and few of a large one, so what is frequent shows in the
change itself: Adam's changes after few steps lie near multiples of the learning rate. Bins have `2**detail` to an octave.
What predicts a bin: the typical size of its tensor's changes, from which bins are counted; tensors of one scale share a
table, and all tensors of few changes. Where a unit in the last
place of a weight is about as large as the changes, the distance between the two exponents is the context instead.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs import symbol_coding
from fl_sim.codecs.bits import Reader, varint
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.symbol_coding import Bytes
from fl_sim.codecs.value_coder import Counts, Values, tensor_slices
from fl_sim.core.kernels.change_reference import BINS, COARSE, FINITE, FIRST, SAME, WHOLE, Keys, Words
from fl_sim.core.kernels.coding import (
    change_bins,
    change_contexts,
    change_cut,
    change_join,
    change_keys,
    pack_bits,
    unpack_bits,
)

PIECE = 1 << 16
HEAD = struct.Struct("<BHB")
FINEST, OCTAVE = 4, 16
"""Largest detail; keys of an octave."""
BIAS = 1023 - 127
"""Exponent of a float64 over that of the same float32, as stored."""
SCALES, ENOUGH = 16, 8192
"""Most scales with tables of their own, and the changes that are worth one."""
ABOVE = 8
"""Octaves above the typical change of a tensor in which there are bins, if there are changes as large."""
SAMPLE = 1 << 11
"""Values of a tensor that are looked at to make a plan."""


class Plan(NamedTuple):
    """What both ends need beside the symbols: bits below the octave, bins below a tensor's scale, and the scales."""

    detail: int
    below: int
    own: Bytes
    scales: Bytes

    def written(self) -> bytes:
        """The plan as bytes."""
        return HEAD.pack(self.detail, self.below, len(self.own)) + self.own.tobytes() + self.scales.tobytes()

    @property
    def shift(self) -> int:
        """Bits of a key that a bin leaves out."""
        return FINEST - self.detail

    def pieces(self, tensors: list[slice]) -> Iterator[tuple[int, slice]]:
        """(first bin, slice) of each piece."""
        last = (FINITE >> self.shift) - BINS - FIRST
        for scale, tensor in zip(self.scales.tolist(), tensors, strict=True):
            first = min(last, max(0, ((scale + BIAS) << self.detail) - self.below))
            for piece in _pieces([tensor]):
                yield first, piece

    def contexts(self, base: Words, tensors: list[slice]) -> Bytes:
        """The context of each change, given the bits of what it changes."""
        table_of = np.full(256, COARSE, dtype=np.uint8)
        table_of[self.own] = COARSE + 1 + np.arange(len(self.own))
        contexts = np.empty(len(base), dtype=np.uint8)
        change_contexts(base, _sizes(tensors), self.scales, table_of[self.scales], contexts)
        return contexts

    @property
    def kinds(self) -> int:
        """Number of contexts."""
        return COARSE + 1 + len(self.own)


@dataclass(frozen=True)
class ExactDelta:
    """Change of the held values, lossless.

    Attributes:
        id: number on the wire.
        counts: values of each tensor, known to both ends; empty = all values are one tensor's.
        base: the receiver's values at the same coordinates.
    """

    id: int
    counts: Counts = ()
    base: Values = field(default_factory=lambda: np.zeros(0, dtype=np.float32), compare=False)

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        size, words, base = len(values), _words(values), _words(self.base)
        keys, symbols, tensors = np.empty(size, np.uint16), np.empty(size, np.uint8), tensor_slices(self.counts, size)
        change_keys(words, base, keys)
        plan = _plan(keys, tensors)
        room = _room(tensors)
        signs, widths, places = np.empty(room, np.uint8), np.empty(room, np.uint8), np.empty(room, np.uint32)
        out, parts = np.empty(4 * room, dtype=np.uint8), []
        for first, piece in plan.pieces(tensors):
            n = piece.stop - piece.start
            change_cut(
                words[piece], base[piece], keys[piece], first, plan.shift,
                symbols[piece], signs[:n], widths[:n], places[:n],
            )  # fmt: skip
            signed = _signed(symbols[piece])
            sent = signs[:n] if signed.all() else signs[:n][signed]
            parts.append(np.packbits(sent, bitorder="little").tobytes())
            parts.append(out[: pack_bits(places[:n], widths[:n], out)].tobytes())
        code = symbol_coding.encode(symbols, plan.contexts(base, tensors), plan.kinds)
        return b"".join([plan.written(), varint(len(code)), code, *parts])

    def decode(self, data: memoryview, count: int) -> Values:
        if not count:
            if len(data):
                raise CorruptPayload("values where none are due")
            return np.zeros(0, dtype=np.float32)
        tensors, base = tensor_slices(self.counts, count), _words(self.base)
        plan = _read(data, len(tensors))
        reader = Reader(data, len(plan.written()))
        end = reader.varint(len(data)) + reader.at
        symbols = symbol_coding.decode(data[reader.at : end], plan.contexts(base, tensors), plan.kinds)
        bits = _Bits(np.frombuffer(data[end:], dtype=np.uint8))
        words = np.empty(count, dtype=np.uint32)
        room = _room(tensors)
        firsts, spans, widths = np.empty(room, np.uint32), np.empty(room, np.uint32), np.empty(room, np.uint8)
        for first, piece in plan.pieces(tensors):
            n, mine = piece.stop - piece.start, symbols[piece]
            signs = bits.flags(_signed(mine))
            fine = change_bins(base[piece], mine, signs, first, plan.shift, firsts[:n], spans[:n], widths[:n])
            if fine:
                bits.read(widths[:n], words[piece])
                fine = change_join(words[piece], firsts[:n], spans[:n], mine, signs)
            if not fine:
                raise CorruptPayload("a change that is outside of its bin")
        bits.finish()
        return words.view("<f4")


@dataclass
class _Bits:
    """Bits of several widths, read piece by piece."""

    stream: Bytes
    at: int = 0

    def _next(self, total: int) -> Bytes:
        until = self.at + -(-total // 8)
        if until > len(self.stream) or (total % 8 and self.stream[until - 1] >> total % 8):
            raise CorruptPayload("the bits of the changes are cut off, or not padded with zeros")
        part, self.at = self.stream[self.at : until], until
        return part

    def flags(self, where: NDArray[np.bool_]) -> Bytes:
        """A bit for each place that is set, 0 for the others."""
        count = int(np.count_nonzero(where))
        read = np.unpackbits(self._next(count), count=count, bitorder="little")
        if count == len(where):
            return read
        made = np.zeros(len(where), dtype=np.uint8)
        made[where] = read
        return made

    def read(self, widths: Bytes, out: Words) -> None:
        """Numbers of these widths."""
        unpack_bits(self._next(int(widths.sum(dtype=np.int64))), 0, widths, out)

    def finish(self) -> None:
        if self.at != len(self.stream):
            raise CorruptPayload("the bits of the changes have another length")


def _sizes(tensors: list[slice]) -> NDArray[np.int64]:
    return np.array([tensor.stop - tensor.start for tensor in tensors], dtype=np.int64)


def _words(values: Values) -> Words:
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint32)


def _signed(symbols: Bytes) -> NDArray[np.bool_]:
    """Which symbols have a sign."""
    signed: NDArray[np.bool_] = (symbols - np.uint8(SAME + 1)) < np.uint8(WHOLE - SAME - 1)
    return signed


def _pieces(tensors: list[slice]) -> Iterator[slice]:
    """Parts of tensors that stay in the cache from one loop to the next."""
    for tensor in tensors:
        for start in range(tensor.start, tensor.stop, PIECE):
            yield slice(start, min(tensor.stop, start + PIECE))


def _room(tensors: list[slice]) -> int:
    """Values of the largest piece."""
    largest: int = max(tensor.stop - tensor.start for tensor in tensors)
    return min(PIECE, largest)


def _read(data: memoryview, tensors: int) -> Plan:
    if len(data) < HEAD.size:
        raise CorruptPayload("changes are cut off")
    detail, below, tables = HEAD.unpack_from(data)
    scales = np.frombuffer(data[HEAD.size : HEAD.size + tables + tensors], dtype=np.uint8)
    if detail > FINEST or tables > SCALES or len(scales) < tables + tensors:
        raise CorruptPayload("bins of changes that do not exist, too many tables, or changes that are cut off")
    return Plan(detail, below, scales[:tables], scales[tables:])


def _plan(keys: Keys, tensors: list[slice]) -> Plan:
    """What suits these changes, by a sample of each tensor."""
    steps = 1 + _sizes(tensors) // SAMPLE
    drawn = [keys[tensor][::step] for tensor, step in zip(tensors, steps.tolist(), strict=True)]
    owners = np.repeat(np.arange(len(drawn)), [len(part) for part in drawn])
    sample = np.concatenate(drawn)
    finite = (sample - np.uint16(1)) < np.uint16(FINITE - 1)
    sample, owners = sample[finite], owners[finite]
    seen = np.bincount(owners, minlength=len(drawn))
    # Sums of integers below 2**53 are exact in the float64 that they are made in.
    sums = np.bincount(owners, weights=sample, minlength=len(drawn))
    scales = np.clip(np.rint(sums / np.maximum(1, OCTAVE * seen)).astype(np.int64) - BIAS, 0, 255)
    changed = seen * steps
    sizes = np.bincount(scales, weights=changed, minlength=256)
    own = np.sort(np.argsort(-sizes, kind="stable")[: min(SCALES, np.count_nonzero(sizes >= ENOUGH))]).astype(np.uint8)
    if not len(sample):
        return Plan(0, 0, own, scales.astype(np.uint8))
    detail = _detail(sample, 1 + len(own), int(changed.sum()))
    largest = int((sample - OCTAVE * (scales + BIAS)[owners]).max())
    above = min(max(0, largest + OCTAVE), ABOVE * OCTAVE) >> (FINEST - detail)
    return Plan(detail, BINS - 1 - above, own, scales.astype(np.uint8))


def _detail(sample: Keys, tables: int, size: int) -> int:
    """The detail at which so many symbols and their tables take least."""
    counts = np.bincount(sample - (int(sample.min()) & -OCTAVE))
    costs = []
    for detail in range(FINEST + 1):
        groups = np.add.reduceat(counts, np.arange(0, len(counts), 1 << (FINEST - detail)))
        used = groups[groups > 0]
        bits = float((used * np.log2(len(sample) / used)).sum()) - detail * len(sample)
        costs.append(bits * size / len(sample) + 8.0 * tables * len(used))
    return int(np.argmin(costs))
