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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs import symbol_coding
from fl_sim.codecs.bits import Reader, varint
from fl_sim.codecs.change_plan import PIECE, contexts_of, plans_of, read
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.symbol_coding import Bytes
from fl_sim.codecs.value_coder import Counts, Values, tensor_slices
from fl_sim.core.kernels.change_reference import SAME, WHOLE, Keys, Words
from fl_sim.core.kernels.coding import (
    change_bins,
    change_cut,
    change_join,
    change_keys,
    pack_bits,
    unpack_bits,
)

AT_ONCE = 1 << 20
"""Values of clients that are looked at together: what takes less time for several of them stays in memory for so many."""


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
        return self.encode_all(values[np.newaxis], (seed,))[0]

    def encode_all(self, values: Values, seeds: Sequence[int]) -> list[bytes]:
        """See `Together`."""
        clients, size = values.shape
        if not size:
            return [b""] * clients
        base, tensors, together = _words(self.base), tensor_slices(self.counts, size), max(1, AT_ONCE // size)
        starts = range(0, clients, together)
        return [made for at in starts for made in _encoded(_words(values[at : at + together]), base, tensors)]

    def decode(self, data: memoryview, count: int) -> Values:
        values: Values = self.decode_all((data,), count)[0]
        return values

    def decode_all(self, data: Sequence[memoryview], count: int) -> Values:
        """See `Together`."""
        if not count and any(map(len, data)):
            raise CorruptPayload("values where none are due")
        words: Words = np.empty((len(data), count), dtype=np.uint32)
        if count:
            tensors, base = tensor_slices(self.counts, count), _words(self.base)
            scratch = _Scratch.of(tensors)
            for each, row in zip(data, words, strict=True):
                _decode(each, row, base, tensors, scratch)
        return words.view("<f4")


class _Scratch(NamedTuple):
    """Memory for the numbers of a piece: two words and two bytes for each value."""

    first: Words
    second: Words
    narrow: Bytes
    wide: Bytes

    @classmethod
    def of(cls, tensors: list[slice]) -> _Scratch:
        room = _room(tensors)
        words, narrow = np.empty((2, room), np.uint32), np.empty((2, room), np.uint8)
        return cls(*words, *narrow)


def _encoded(rows: Words, base: Words, tensors: list[slice]) -> Iterator[bytes]:
    """The bytes of each client's values, whose bits are rows of (clients, values)."""
    clients, size = rows.shape
    keys: Keys = np.empty(rows.shape, dtype=np.uint16)
    change_keys(rows.reshape(-1), np.tile(base, clients) if clients > 1 else base, keys.reshape(-1))
    plans = plans_of(keys, tensors)
    contexts = contexts_of(plans, base, tensors).reshape(rows.shape)
    symbols, (places, _, signs, widths) = np.empty(size, np.uint8), _Scratch.of(tensors)
    out = np.empty(4 * len(places), dtype=np.uint8)
    for plan, words, own_keys, own_contexts in zip(plans, rows, keys, contexts, strict=True):
        parts = []
        for first, piece in plan.pieces(tensors):
            n = piece.stop - piece.start
            change_cut(
                words[piece], base[piece], own_keys[piece], first, plan.shift,
                symbols[piece], signs[:n], widths[:n], places[:n],
            )  # fmt: skip
            signed = _signed(symbols[piece])
            sent = signs[:n] if signed.all() else signs[:n][signed]
            parts.append(np.packbits(sent, bitorder="little").tobytes())
            parts.append(out[: pack_bits(places[:n], widths[:n], out)].tobytes())
        code = symbol_coding.encode(symbols, own_contexts, plan.kinds)
        yield b"".join([plan.written(), varint(len(code)), code, *parts])


def _decode(data: memoryview, words: Words, base: Words, tensors: list[slice], scratch: _Scratch) -> None:
    """Fill in the bits of a client's values. Raises CorruptPayload."""
    plan = read(data, len(tensors))
    reader = Reader(data, len(plan.written()))
    end = reader.varint(len(data)) + reader.at
    symbols = symbol_coding.decode(data[reader.at : end], contexts_of([plan], base, tensors), plan.kinds)
    bits = _Bits(np.frombuffer(data[end:], dtype=np.uint8))
    firsts, spans, widths, _ = scratch
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


def _words(values: Values) -> Words:
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint32)


def _signed(symbols: Bytes) -> NDArray[np.bool_]:
    """Which symbols have a sign."""
    signed: NDArray[np.bool_] = (symbols - np.uint8(SAME + 1)) < np.uint8(WHOLE - SAME - 1)
    return signed


def _room(tensors: list[slice]) -> int:
    """Values of the largest piece."""
    largest: int = max(tensor.stop - tensor.start for tensor in tensors)
    return min(PIECE, largest)
