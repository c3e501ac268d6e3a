"""Symbols 0..255 near their order-0 entropy: an rANS coder with one static table for each context.

    precision u8 | first and last symbol of each context, u8 each | bit lengths of the slots, 4 bits each, zeros up to a byte |
    the slots' bits below their leading ones, zeros up to a byte | code | rest of the rider

Both ends know the number of symbols and each one's context. A table's slots are the counts scaled to `2**precision`, with at
least one slot for whatever occurs: few symbols have coarse and therefore short tables. A context that does not occur has a
first symbol of 1 and a last of 0. Where all this is no shorter than the symbols as bytes, a precision of 0 says that those follow.

A lane of the coder takes 32 bits of which its symbols fill 16. The other 16 carry other bytes of the payload, the rider, whose
length both ends know; what does not fit follows the code. Without a rider they are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.bits import Reader
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.core.kernels.coding import count_symbols, pack_bits, rans_decode, rans_encode, unpack_bits

Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]
Tables = NDArray[np.uint16]
ALPHABET = 256
SYMBOLS_PER_LANE, FEW_PER_LANE, FEW_LANES = 4096, 1024, 8
"""Symbols that a lane is worth; the first lanes wait for each other most, and other bytes of small payloads fill them."""
MOST_LANES, MOST_BITS, FEWEST_BITS = 256, 12, 8
FAST_LANES, FAST_BITS = 16, 10
"""From so many lanes on, tables are at least so precise: what the vectorised loop takes."""
RAW = 0


def _precision(counts: Counts) -> int:
    """Bits of a table at which what rounding loses and what the tables take are about least together."""
    used = counts > 0
    size, kinds, rare = (
        int(counts.sum()),
        int(used.sum()),
        int((used & (counts * 512 < counts.sum(axis=1)[:, None])).sum()),
    )
    best = (size * (kinds + 8 * rare)) ** 0.5 / 2
    fewest = FAST_BITS if _lanes(size) >= FAST_LANES else FEWEST_BITS
    return min(_most_bits(size, len(counts)), max(fewest, int(best).bit_length()))


def _most_bits(size: int, contexts: int) -> int:
    """Precision at which a decoder's tables have no more slots than there are symbols."""
    return min(MOST_BITS, max(FEWEST_BITS, (size // contexts).bit_length() - 1))


def _lanes(count: int) -> int:
    worth = max(min(FEW_LANES, count // FEW_PER_LANE), count // SYMBOLS_PER_LANE)
    return min(MOST_LANES, 1 << max(0, worth.bit_length() - 1))


def counted(symbols: Bytes, contexts: Bytes, kinds: int) -> Counts:
    """How often each symbol occurs in each of `kinds` contexts, (kinds, 256)."""
    counts = np.zeros(kinds * ALPHABET, dtype=np.int64)
    count_symbols(symbols, contexts, counts)
    return counts.reshape(kinds, ALPHABET)


def _slots(counts: Counts, bits: int) -> Counts:
    """One context's counts scaled to sum to `2**bits`, at least 1 where a count is not 0. Integers only."""
    total, wanted = int(counts.sum()), 1 << bits
    if not total:
        return counts
    slots = np.where(counts > 0, np.maximum(1, (2 * counts * wanted + total) // (2 * total)), 0)
    while (missing := wanted - int(slots.sum())) != 0:
        step = 1 if missing > 0 else -1
        able = np.flatnonzero(slots > 0 if missing > 0 else slots > 1)
        error = counts[able] * wanted - slots[able] * total
        slots[able[np.argsort(-step * error, kind="stable")[: abs(missing)]]] += step
    return slots


@dataclass(frozen=True)
class Code:
    """Tables of slots for each context, (contexts, 256), that sum to `2**precision`."""

    precision: int
    tables: Tables

    @classmethod
    def of(cls, counts: Counts) -> Code:
        """Tables for symbols that occur so often in each context."""
        precision = _precision(counts)
        return cls(precision, np.stack([_slots(row, precision) for row in counts]).astype(np.uint16))

    def written(self) -> bytes:
        """The tables as bytes."""
        ends = np.array([_ends(row) for row in self.tables], dtype=np.uint8)
        slots = self.tables[_listed(ends)].astype(np.uint32)
        lengths = np.frexp(slots.astype(np.float64))[1].astype(np.uint8)
        parts = []
        for values, widths in ((lengths.astype(np.uint32), np.full(len(slots), 4, np.uint8)), (slots, _below(lengths))):
            out = np.empty(2 * len(slots) + 8, dtype=np.uint8)
            parts.append(out[: pack_bits(values, widths, out)].tobytes())
        return bytes([self.precision]) + ends.tobytes() + b"".join(parts)

    @classmethod
    def read(cls, reader: Reader, kinds: int, alphabet: int, size: int) -> Code:
        """Invert `written`, for so many symbols.

        Raises:
            CorruptPayload: the tables are cut off, or one does not sum to its precision.
        """
        data = np.frombuffer(reader.rest(), dtype=np.uint8)
        if len(data) < 1 + 2 * kinds or not FEWEST_BITS <= data[0] <= _most_bits(size, kinds):
            raise CorruptPayload("tables of symbols are cut off, or of an impossible precision")
        ends = data[1 : 1 + 2 * kinds].reshape(kinds, 2)
        if (ends[:, 1] >= alphabet).any():
            raise CorruptPayload("a table of symbols that do not exist")
        precision, listed = int(data[0]), _listed(ends)
        count, at = int(np.count_nonzero(listed)), 1 + 2 * kinds
        lengths, at = _unpacked(data, at, np.full(count, 4, np.uint8))
        widths = _below(lengths.astype(np.uint8))
        slots, at = _unpacked(data, at, widths)
        slots |= np.where(lengths > 0, np.uint32(1) << widths.astype(np.uint32), np.uint32(0))
        tables = np.zeros((kinds, ALPHABET), dtype=np.uint16)
        tables[listed] = slots
        # Reductions over a table of bools or short integers go through a buffer that is larger than the table.
        until = np.cumsum(np.maximum(0, ends[:, 1].astype(np.int64) - ends[:, 0] + 1))
        sums = np.diff(np.append(0, np.cumsum(slots, dtype=np.int64))[np.append(0, until)])
        if ((sums != 0) & (sums != 1 << precision)).any() or (slots > 1 << MOST_BITS).any():
            raise CorruptPayload("a table of symbols does not sum to its precision")
        reader.at += at
        return cls(precision, tables)


def _ends(slots: Tables) -> tuple[int, int]:
    """First and last symbol that a table has; (1, 0) where it has none."""
    used = np.flatnonzero(slots)
    return (int(used[0]), int(used[-1])) if len(used) else (1, 0)


def _listed(ends: Bytes) -> NDArray[np.bool_]:
    """The symbols that are written, (contexts, 256)."""
    symbols = np.arange(ALPHABET, dtype=np.uint8)
    return (symbols >= ends[:, :1]) & (symbols <= ends[:, 1:])


def _below(lengths: Bytes) -> Bytes:
    """Bits below the leading one."""
    return np.where(lengths > 0, lengths - (lengths > 0), 0).astype(np.uint8)


def _unpacked(data: Bytes, at: int, widths: Bytes) -> tuple[NDArray[np.uint32], int]:
    """(values of these widths from byte `at` on, where they end). Raises CorruptPayload."""
    total = int(widths.sum(dtype=np.int64))
    end = at + -(-total // 8)
    if end > len(data) or (total % 8 and data[end - 1] >> total % 8):
        raise CorruptPayload("a table of symbols is cut off, or not padded with zeros")
    out = np.empty(len(widths), dtype=np.uint32)
    unpack_bits(data[at:end], 0, widths, out)
    return out, end


def encode(symbols: Bytes, contexts: Bytes, kinds: int, code: Code | None = None, rider: bytes = b"") -> bytes:
    """Code symbols, each in one of `kinds` contexts, at most 64; `code` where their tables were made before."""
    size = len(symbols)
    if not size:
        return rider
    code = Code.of(counted(symbols, contexts, kinds)) if code is None else code
    ends = np.zeros(_lanes(size), dtype="<u2")
    carried = np.frombuffer(rider[: ends.nbytes], dtype=np.uint8)
    ends.view(np.uint8)[: len(carried)] = carried
    out = np.empty(2 * size + 4 * len(ends), dtype=np.uint8)
    start = rans_encode(symbols, contexts, code.tables.reshape(-1), code.precision, ends.astype(np.uint16), out)
    written = code.written()
    if len(written) + len(out) - start - len(carried) > size:
        return b"".join([bytes([RAW]), symbols.tobytes(), rider])
    return b"".join([written, out[start:].data, rider[ends.nbytes :]])


def decode(data: memoryview, contexts: Bytes, kinds: int, alphabet: int = ALPHABET) -> Bytes:
    """Invert `encode` for as many symbols below `alphabet` as there are contexts, without a rider; `data` ends with them.

    Raises:
        CorruptPayload: the bytes are no code of so many symbols.
    """
    return with_rider(data, contexts, kinds, alphabet, 0)[0]


def with_rider(
    data: memoryview, contexts: Bytes, kinds: int, alphabet: int, length: int
) -> tuple[Bytes, memoryview | bytes]:
    """(symbols, rider of so many bytes): invert `encode`.

    Raises:
        CorruptPayload: the bytes are no code of so many symbols, or of another rider.
    """
    size = len(contexts)
    symbols = np.empty(size, dtype=np.uint8)
    if not size:
        if len(data) != length:
            raise CorruptPayload("symbols where none are due")
        return symbols, data
    if len(data) == 1 + size + length and data[0] == RAW:
        symbols[:] = np.frombuffer(data[1 : 1 + size], dtype=np.uint8)
        if symbols.max() >= alphabet:
            raise CorruptPayload("a symbol that does not exist")
        return symbols, data[1 + size :]
    ends = np.empty(_lanes(size), dtype=np.uint16)
    end = len(data) - max(0, length - ends.nbytes)
    reader = Reader(data[: max(0, end)])
    code = Code.read(reader, kinds, alphabet, size)
    words = np.frombuffer(reader.rest(), dtype=np.uint8)
    if not rans_decode(words, contexts, code.tables.reshape(-1), code.precision, ends, symbols):
        raise CorruptPayload("the code of the symbols is damaged")
    carried = ends.astype("<u2").tobytes()
    if any(carried[length:]):
        raise CorruptPayload("lanes carry more than is due")
    return symbols, b"".join([carried[:length], data[end:]])


def single(count: int) -> Bytes:
    """One context for `count` symbols."""
    return np.zeros(count, dtype=np.uint8)


def by_block(classes: Sequence[int] | Bytes, sizes: NDArray[np.int64]) -> Bytes:
    """The context of each symbol where all symbols of a block have one."""
    return np.repeat(np.asarray(classes, dtype=np.uint8), sizes)
