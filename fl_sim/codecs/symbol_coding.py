"""Symbols 0..255 near their order-0 entropy: an rANS coder with one static table for each context.

    tables (`fl_sim.core.kernels.table_reference`) | code | rest of the rider

Both ends know the number of symbols and each one's context. A table's slots are the counts scaled to `2**precision`, with at
least one slot for whatever occurs: few symbols have coarse and therefore short tables. Where all this is no shorter than
the symbols as bytes, a precision of 0 says that those follow.

A lane of the coder takes 32 bits of which its symbols fill 16. The other 16 carry other bytes of the payload, the rider, whose
length both ends know; what does not fit follows the code. Without a rider they are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.errors import CorruptPayload
from fl_sim.core.kernels.coding import count_symbols, rans_decode, rans_encode, table_make, table_read, table_write
from fl_sim.core.kernels.table_reference import REFUSED

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


class Code(NamedTuple):
    """Tables of slots for each context, one after the other, that sum to `2**precision`."""

    precision: int
    tables: Tables

    @classmethod
    def of(cls, counts: Counts, size: int) -> Code:
        """Tables for `size` symbols that occur so often in each context, (contexts, 256)."""
        fewest = FAST_BITS if _lanes(size) >= FAST_LANES else FEWEST_BITS
        tables = np.empty(counts.size, dtype=np.uint16)
        return cls(table_make(counts.reshape(-1), fewest, _most_bits(size, len(counts)), tables), tables)

    def written(self) -> Bytes:
        """The tables as bytes."""
        kinds = len(self.tables) // ALPHABET
        out = np.empty(3 + 2 * kinds + 2 * len(self.tables), dtype=np.uint8)
        return out[: table_write(self.tables, self.precision, out)]

    @classmethod
    def read(cls, data: Bytes, kinds: int, alphabet: int, size: int) -> tuple[Code, int]:
        """(tables for so many symbols, bytes that they take of `data`): invert `written`.

        Raises:
            CorruptPayload: the tables are cut off, or one does not sum to its precision.
        """
        tables = np.empty(kinds * ALPHABET, dtype=np.uint16)
        taken = table_read(data, _most_bits(size, kinds), alphabet, tables)
        if taken < 0:
            raise CorruptPayload(REFUSED[taken])
        return cls(int(data[0]), tables), taken


def encode(symbols: Bytes, contexts: Bytes, kinds: int, code: Code | None = None, rider: bytes = b"") -> bytes:
    """Code symbols, each in one of `kinds` contexts, at most 64; `code` where their tables were made before."""
    size = len(symbols)
    if not size:
        return rider
    code = Code.of(counted(symbols, contexts, kinds), size) if code is None else code
    lanes = _lanes(size)
    carried = rider[: 2 * lanes]
    ends = np.frombuffer(carried.ljust(2 * lanes, b"\0"), dtype="<u2").astype(np.uint16, copy=False)
    out = np.empty(2 * size + 4 * lanes, dtype=np.uint8)
    start = rans_encode(symbols, contexts, code.tables, code.precision, ends, out)
    written = code.written()
    if len(written) + len(out) - start - len(carried) > size:
        return b"".join([bytes([RAW]), symbols.data, rider])
    return b"".join([written.data, out[start:].data, rider[2 * lanes :]])


def decode(data: memoryview, contexts: Bytes, kinds: int, alphabet: int = ALPHABET) -> Bytes:
    """Invert `encode` for as many symbols below `alphabet` as there are contexts, without a rider; `data` ends with them.

    Raises:
        CorruptPayload: the bytes are no code of so many symbols.
    """
    return with_rider(data, contexts, kinds, alphabet, 0)[0]


def with_rider(
    data: memoryview, contexts: Bytes, kinds: int, alphabet: int, length: int, out: Bytes | None = None
) -> tuple[Bytes, memoryview | bytes]:
    """(symbols, rider of so many bytes): invert `encode`. `out` is memory for the symbols.

    Raises:
        CorruptPayload: the bytes are no code of so many symbols, or of another rider.
    """
    size = len(contexts)
    symbols = np.empty(size, dtype=np.uint8) if out is None else out
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
    coded = np.frombuffer(data[: max(0, end)], dtype=np.uint8)
    code, at = Code.read(coded, kinds, alphabet, size)
    if not rans_decode(coded[at:], contexts, code.tables, code.precision, ends, symbols):
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
