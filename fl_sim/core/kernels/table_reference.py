"""Tables of slots for rANS: made of counts, written and read; reference in NumPy.

    precision u8 | first and last symbol of each table, u8 each | bit lengths of the slots, 4 bits each, zeros up to a byte |
    the slots' bits below their leading ones, zeros up to a byte

A table says how many of `2**precision` slots each of 256 symbols has. Where no symbol has any, the first symbol is 1 and the
last 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.kernels.coding_reference import MOST_PRECISE, SYMBOLS, Bytes, Tables, pack_bits, unpack_bits

Counts = NDArray[np.int64]
FEWEST_BITS, RARE, LARGEST = 8, 512, 1 << 40
CUT_OFF, NO_SUCH_SYMBOL, NOT_PADDED, OTHER_SUM = -1, -2, -3, -4
REFUSED = {
    CUT_OFF: "tables of symbols are cut off, or of an impossible precision",
    NO_SUCH_SYMBOL: "a table of symbols that do not exist",
    NOT_PADDED: "a table of symbols is cut off, or not padded with zeros",
    OTHER_SUM: "a table of symbols does not sum to its precision",
}
"""What `table_read` answers instead of a size, in words."""


def table_make(counts: Counts, fewest: int, most: int, tables: Tables, /) -> int:
    """Scale counts to tables of slots; at least 1 where a count is not 0. Returns the precision. Integers only.

    Args:
        counts: how often each of 256 symbols occurs in each context, together at most 2**40.
        fewest, most: bits of a precision; `most` where they disagree.
        tables: receives the slots, as many as counts; they sum to `2**precision`, or to 0 where a context does not occur.
    """
    if (
        len(counts) % SYMBOLS
        or len(counts) != len(tables)
        or not FEWEST_BITS <= min(fewest, most) <= most <= MOST_PRECISE
    ):
        raise ValueError("256 counts for each table, 8 to 12 bits")
    if (counts < 0).any() or (counts > LARGEST).any() or counts.sum() > LARGEST:
        raise ValueError("256 counts for each table, 8 to 12 bits")
    rows = counts.reshape(-1, SYMBOLS)
    precision = _precision(rows, fewest, most)
    for row, table in zip(rows, tables.reshape(-1, SYMBOLS), strict=True):
        table[:] = _slots(row, precision)
    return precision


def _precision(counts: Counts, fewest: int, most: int) -> int:
    """Bits of a table at which what rounding loses and what the tables take are about least together."""
    used = counts > 0
    rare = used & (counts * RARE < counts.sum(axis=1)[:, None])
    weight = int(counts.sum()) * (int(used.sum()) + 8 * int(rare.sum()))
    return min(most, max(fewest, (weight.bit_length() - 1) // 2))


def _slots(counts: Counts, bits: int) -> Counts:
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


def table_write(tables: Tables, precision: int, out: Bytes, /) -> int:
    """Write tables of a precision to the front of `out`; returns the bytes written.

    Args:
        out: at least 3 bytes, 2 a table and 2 for each of its 256 symbols.
    """
    if len(tables) % SYMBOLS or not FEWEST_BITS <= precision <= MOST_PRECISE:
        raise ValueError("tables of 256 that sum to their precision, and room for them")
    rows = tables.reshape(-1, SYMBOLS)
    if not np.isin(rows.sum(axis=1, dtype=np.int64), (0, 1 << precision)).all() or len(out) < 3 + 2 * len(
        rows
    ) + 2 * len(tables):
        raise ValueError("tables of 256 that sum to their precision, and room for them")
    ends = np.array([_ends(row) for row in rows], dtype=np.uint8).reshape(-1, 2)
    slots = rows[_listed(ends)].astype(np.uint32)
    lengths = np.frexp(slots.astype(np.float64))[1].astype(np.uint8)
    at = 1 + ends.size
    out[0] = precision
    out[1:at] = ends.reshape(-1)
    at += pack_bits(lengths.astype(np.uint32), np.full(len(slots), 4, np.uint8), out[at:])
    return at + pack_bits(slots, _below(lengths), out[at:])


def table_read(data: Bytes, most: int, alphabet: int, tables: Tables, /) -> int:
    """Invert `table_write`: fill as many tables as `tables` has room for.

    Args:
        data: begins with them.
        most: the largest precision.
        alphabet: no symbol from this one on has slots.

    Returns:
        How many bytes they took, or a number of `REFUSED`, with tables of no meaning.
    """
    if len(tables) % SYMBOLS or most > MOST_PRECISE or alphabet > SYMBOLS:
        raise ValueError("tables of 256, at most 12 bits and 256 symbols")
    kinds = len(tables) // SYMBOLS
    if len(data) < 1 + 2 * kinds or not FEWEST_BITS <= data[0] <= most:
        return CUT_OFF
    ends = data[1 : 1 + 2 * kinds].reshape(kinds, 2)
    if (ends[:, 1] >= alphabet).any():
        return NO_SUCH_SYMBOL
    listed = _listed(ends)
    count, at = int(np.count_nonzero(listed)), 1 + 2 * kinds
    lengths, at = _unpacked(data, at, np.full(count, 4, np.uint8))
    if lengths is None:
        return NOT_PADDED
    widths = _below(lengths.astype(np.uint8))
    slots, at = _unpacked(data, at, widths)
    if slots is None:
        return NOT_PADDED
    slots |= np.where(lengths > 0, np.uint32(1) << widths.astype(np.uint32), np.uint32(0))
    tables[:] = 0
    tables.reshape(kinds, SYMBOLS)[listed] = slots
    # Reductions over a table of bools or short integers go through a buffer that is larger than the table.
    until = np.cumsum(np.maximum(0, ends[:, 1].astype(np.int64) - ends[:, 0] + 1))
    sums = np.diff(np.append(0, np.cumsum(slots, dtype=np.int64))[np.append(0, until)])
    if ((sums != 0) & (sums != 1 << int(data[0]))).any() or (slots > 1 << MOST_PRECISE).any():
        return OTHER_SUM
    return at


def _ends(slots: Tables) -> tuple[int, int]:
    """First and last symbol that a table has; (1, 0) where it has none."""
    used = np.flatnonzero(slots)
    return (int(used[0]), int(used[-1])) if len(used) else (1, 0)


def _listed(ends: Bytes) -> NDArray[np.bool_]:
    """The symbols that are written, (tables, 256)."""
    symbols = np.arange(SYMBOLS, dtype=np.uint8)
    return (symbols >= ends[:, :1]) & (symbols <= ends[:, 1:])


def _below(lengths: Bytes) -> Bytes:
    """Bits below the leading one."""
    return np.where(lengths > 0, lengths - (lengths > 0), 0).astype(np.uint8)


def _unpacked(data: Bytes, at: int, widths: Bytes) -> tuple[NDArray[np.uint32] | None, int]:
    """(values of these widths from byte `at` on, where they end); None where they are cut off or not padded with zeros."""
    total = int(widths.sum(dtype=np.int64))
    end = at + -(-total // 8)
    if end > len(data) or (total % 8 and data[end - 1] >> total % 8):
        return None, at
    out = np.empty(len(widths), dtype=np.uint32)
    unpack_bits(data[at:end], 0, widths, out)
    return out, end
