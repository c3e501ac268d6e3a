"""Reference implementation of the codecs' loops in NumPy, vectorised over the lanes of a code.

rANS (Duda, 2013, "Asymmetric numeral systems", section 2.3): a state x in [2**16, 2**32) takes a symbol that has `f` of
`2**bits` slots, the first of them `start`, by x -> (x // f) * 2**bits + x % f + start, after its low 16 bits were written
where it would overflow. Symbol i is coded by lane i % lanes, so that lanes are independent of each other. A lane starts at
`2**16` plus a number of 16 bits, which decoding gives back: what a lane costs over its symbols then carries something.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Tables = NDArray[np.uint16]
Ends = NDArray[np.uint16]
Words = NDArray[np.uint32]

SYMBOLS, CONTEXTS, LANES, LOWEST, MOST_PRECISE = 256, 64, 256, 1 << 16, 12


def _checked(tables: Tables, contexts: Bytes, bits: int, lanes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(slots, first slot) of each context's symbols, shape (contexts, 256)."""
    count = len(tables) // SYMBOLS
    if len(tables) % SYMBOLS or not (
        1 <= count <= CONTEXTS and 8 <= bits <= MOST_PRECISE and lanes in (1 << k for k in range(9))
    ):
        raise ValueError("1 to 64 tables of 256, 8 to 12 bits, a power of two of at most 256 lanes")
    if len(contexts) and contexts.max() >= count:
        raise ValueError("a context without a table")
    slots = tables.reshape(count, SYMBOLS).astype(np.int64)
    if not np.isin(slots.sum(axis=1), (0, 1 << bits)).all():
        raise ValueError("a table does not sum to its precision")
    return slots, np.cumsum(slots, axis=1) - slots


def rans_encode(symbols: Bytes, contexts: Bytes, tables: Tables, bits: int, ends: Ends, out: Bytes, /) -> int:
    """Write the code of `symbols` at the end of `out`; returns where it starts.

    Args:
        symbols, contexts: one of each a symbol.
        tables: slots of each context's 256 symbols; they sum to `2**bits`, or to 0 where a context is not used.
        bits: precision, 8 to 12.
        ends: a number for each lane, which travels in it; a power of two of at most 256 lanes.
        out: at least 2 bytes a symbol and 4 a lane.

    Raises:
        ValueError: a symbol without slots, or arrays that do not fit each other.
    """
    if len(symbols) != len(contexts):
        raise ValueError("expected arrays of equal length")
    lanes = len(ends)
    slots, starts = _checked(tables, contexts, bits, lanes)
    if len(out) < 2 * len(symbols) + 4 * lanes:
        raise ValueError("too little room")
    mine = slots[contexts, symbols]
    if len(mine) and not mine.all():
        raise ValueError("a symbol that its table does not have")
    first = starts[contexts, symbols]
    states = LOWEST + ends.astype(np.int64)
    at = len(out)
    for begin in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        f = mine[begin : begin + lanes]
        x = states[: len(f)]
        full = x >= f << (32 - bits)
        words = (x[full] & 0xFFFF).astype("<u2").view(np.uint8)
        out[at - len(words) : at] = words
        at -= len(words)
        x[full] >>= 16
        states[: len(f)] = (x // f << bits) + x % f + first[begin : begin + lanes]
    out[at - 4 * lanes : at] = states.astype("<u4").view(np.uint8)
    return at - 4 * lanes


def rans_decode(data: Bytes, contexts: Bytes, tables: Tables, bits: int, ends: Ends, symbols: Bytes, /) -> int:
    """Fill `symbols` and `ends`; 1 where `data` is exactly the code of as many symbols, else 0, with symbols of no meaning."""
    lanes = len(ends)
    if len(symbols) != len(contexts):
        raise ValueError("expected arrays of equal length")
    slots, starts = _checked(tables, contexts, bits, lanes)
    owners = np.zeros((len(slots), 1 << bits), dtype=np.uint8)
    for table, used in zip(owners, slots, strict=True):
        table[: used.sum()] = np.repeat(np.arange(SYMBOLS, dtype=np.uint8), used)
    if not slots.sum(axis=1)[contexts].all() or len(data) < 4 * lanes or len(data) % 2:
        return 0
    states = data[: 4 * lanes].view("<u4").astype(np.int64)
    words, at = data[4 * lanes :].view("<u2").astype(np.int64), 0
    if (states < LOWEST).any():
        return 0
    for begin in range(0, len(symbols), lanes):
        c = contexts[begin : begin + lanes]
        x = states[: len(c)]
        slot = x & ((1 << bits) - 1)
        symbol = owners[c, slot]
        x = slots[c, symbol] * (x >> bits) + slot - starts[c, symbol]
        low = np.flatnonzero(x < LOWEST)
        if at + len(low) > len(words):
            return 0
        x[low] = x[low] << 16 | words[at : at + len(low)]
        at += len(low)
        states[: len(c)] = x
        symbols[begin : begin + lanes] = symbol
    ends[:] = states & 0xFFFF
    return int((states >> 16 == 1).all() and at == len(words))


def count_symbols(symbols: Bytes, contexts: Bytes, counts: NDArray[np.int64], /) -> None:
    """Add to `counts`, 256 for each context, how often each symbol occurs in each context."""
    if len(symbols) != len(contexts):
        raise ValueError("expected arrays of equal length")
    if len(counts) % SYMBOLS or (len(contexts) and contexts.max() >= len(counts) // SYMBOLS):
        raise ValueError("256 counts for each context")
    counts += np.bincount(contexts.astype(np.int64) * SYMBOLS + symbols, minlength=len(counts))


def _spread(widths: Bytes) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """For every bit of a stream: which value it belongs to, and its place in that value."""
    owner = np.repeat(np.arange(len(widths), dtype=np.int64), widths)
    ends = np.cumsum(widths, dtype=np.int64)
    return owner, (np.arange(len(owner), dtype=np.int64) - (ends - widths)[owner]).astype(np.uint32)


def pack_bits(values: Words, widths: Bytes, out: Bytes, /) -> int:
    """Write the `widths[i]` lowest bits of each value one after the other, least significant first; returns the bytes written."""
    if len(values) != len(widths):
        raise ValueError("expected arrays of equal length")
    size = -(-int(widths.sum(dtype=np.int64)) // 8)
    if (widths > 32).any() or len(out) < size:
        raise ValueError("widths of at most 32, and room for their sum")
    owner, place = _spread(widths)
    out[:size] = np.packbits((values[owner] >> place & 1).astype(np.uint8), bitorder="little")
    return size


def unpack_bits(data: Bytes, start: int, widths: Bytes, out: Words, /) -> None:
    """Invert `pack_bits` from bit `start` of `data` on."""
    if len(out) != len(widths):
        raise ValueError("expected arrays of equal length")
    size = int(widths.sum(dtype=np.int64))
    if start < 0 or (widths > 32).any() or start + size > 8 * len(data):
        raise ValueError("widths of at most 32, and data for their sum")
    owner, place = _spread(widths)
    skipped = start // 8
    bits = np.unpackbits(data[skipped : -(-(start + size) // 8)], bitorder="little")[start - 8 * skipped :][:size]
    out[:] = 0
    np.bitwise_or.at(out, owner, bits.astype(np.uint32) << place)


def _ordered(bits: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    sign = 1 << (width - 1)
    return np.where(bits & sign, 2 * sign - 1 - bits, bits | sign)


def _require_known(width: int, mantissa: int) -> None:
    if width not in (16, 32) or not 0 < mantissa < width - 1 or width - 1 - mantissa > 8:
        raise ValueError("floats of 16 or 32 bits, with exponents of at most 8")


def float_split(
    values: Words, base: Words, width: int, mantissa: int, lengths: Bytes, exponents: Bytes, extra: Words, /
) -> None:
    """Difference of floats as integers in the order of their values (units in the last place), modulo `2**width`.

    Args:
        values, base: bits of floats of `width` bits, NaN and infinity among them.
        width: 32 or 16.
        mantissa: bits of a float below its exponent.
        lengths: receives the bit length of the magnitude, 0 to `width`.
        exponents: receives the exponent of `base`, as stored.
        extra: receives as many bits: the magnitude below its leading one, and in place of that the sign.
    """
    _require_known(width, mantissa)
    if not len(values) == len(base) == len(lengths) == len(exponents) == len(extra):
        raise ValueError("expected arrays of equal length")
    all_bits, half = (1 << width) - 1, 1 << (width - 1)
    new, old = values.astype(np.int64) & all_bits, base.astype(np.int64) & all_bits
    apart = (_ordered(new, width) - _ordered(old, width)) & all_bits
    down = apart >= half
    size = np.where(down, all_bits + 1 - apart, apart)
    bits = np.frexp(size.astype(np.float64))[1].astype(np.int64)
    top = np.where(size > 0, np.int64(1) << np.maximum(bits - 1, 0), 0)
    lengths[:] = bits
    exponents[:] = old >> mantissa & ((half - 1) >> mantissa)
    extra[:] = (size - top) | np.where(down, top, 0)


def float_join(extra: Words, base: Words, lengths: Bytes, width: int, /) -> None:
    """Invert `float_split`: `extra` becomes the bits of the floats."""
    _require_known(width, width - 9)
    if not len(extra) == len(base) == len(lengths):
        raise ValueError("expected arrays of equal length")
    if (lengths > width).any():
        raise ValueError("a difference longer than its floats")
    all_bits, half = (1 << width) - 1, 1 << (width - 1)
    top = np.where(lengths > 0, np.int64(1) << np.maximum(lengths.astype(np.int64) - 1, 0), 0)
    size = (extra & np.maximum(top - 1, 0)) | top
    apart = np.where(extra & top, -size, size)
    key = (_ordered(base.astype(np.int64) & all_bits, width) + apart) & all_bits
    extra[:] = np.where(key & half, key ^ half, all_bits - key)
