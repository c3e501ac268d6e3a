"""Symbols 0..255 near their order-0 entropy: an rANS coder with one static table for each context.

    alphabet of each context (LEB128: symbols up to the last one that occurs) | slots of its symbols, Elias gamma, zero bits
    up to a byte | code

Both ends know the number of symbols and each one's context. A table's slots are the counts scaled to `2**bits`, with at
least one slot for whatever occurs; `bits` and the number of lanes follow from the number of symbols, so that few symbols
have a short table. A context that does not occur has an alphabet of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.bits import Reader, varint
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.core.kernels.coding import count_symbols, rans_decode, rans_encode

Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]
Tables = NDArray[np.uint16]
ALPHABET = 256
SYMBOLS_PER_LANE = 4096
MOST_LANES, MOST_BITS, FEWEST_BITS = 256, 14, 8


def _precision(count: int) -> int:
    return min(MOST_BITS, max(FEWEST_BITS, count.bit_length()))


def _lanes(count: int) -> int:
    return min(MOST_LANES, 1 << max(0, (count // SYMBOLS_PER_LANE).bit_length() - 1))


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


def tables_of(counts: Counts, size: int) -> Tables:
    """Slots of each context for a code of `size` symbols."""
    return np.stack([_slots(row, _precision(size)) for row in counts]).astype(np.uint16)


def cost_bits(counts: Counts, tables: Tables) -> float:
    """Predicted size of code and tables, in bits."""
    used = counts > 0
    precision = np.log2(np.maximum(tables.sum(axis=1, keepdims=True), 1))
    code = float((counts * (precision - np.log2(np.where(used, tables, 1))))[used].sum())
    lengths = [_alphabet(row) for row in tables]
    gamma = sum(
        2 * (int(slots) + 1).bit_length() - 1 for row, n in zip(tables, lengths, strict=True) for slots in row[:n]
    )
    return code + gamma + 8.0 * len(tables)


def _alphabet(slots: Tables) -> int:
    used = np.flatnonzero(slots)
    return int(used[-1]) + 1 if len(used) else 0


def _written(tables: Tables) -> bytes:
    lengths = [_alphabet(row) for row in tables]
    stream = "".join(
        "0" * (value.bit_length() - 1) + f"{value:b}"
        for row, length in zip(tables, lengths, strict=True)
        for value in (row[:length] + np.uint16(1)).tolist()
    )
    size = -(-len(stream) // 8)
    return b"".join(map(varint, lengths)) + int(stream.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")


def _read(reader: Reader, kinds: int, bits: int) -> Tables:
    """The tables of `kinds` contexts.

    Raises:
        CorruptPayload: they are cut off, or one does not sum to `2**bits`.
    """
    lengths = [reader.varint(ALPHABET) for _ in range(kinds)]
    longest = 2 * bits + 1
    rest = reader.rest()[: -(-sum(lengths) * longest // 8)]
    stream = f"{int.from_bytes(rest, 'big'):b}".zfill(8 * len(rest)) if len(rest) else ""
    tables, at = np.zeros((kinds, ALPHABET), dtype=np.uint16), 0
    for row, length in zip(tables, lengths, strict=True):
        for symbol in range(length):
            zeros = stream.find("1", at, at + bits + 1) - at
            if zeros < 0 or at + 2 * zeros + 1 > len(stream):
                raise CorruptPayload("a table of symbols is cut off")
            row[symbol] = int(stream[at + zeros : at + 2 * zeros + 1], 2) - 1  # at most 2 * 2**bits
            at += 2 * zeros + 1
        if length and (row.sum() != 1 << bits or not row[length - 1]):
            raise CorruptPayload("a table of symbols does not sum to its precision")
    if "1" in stream[at : -(-at // 8) * 8]:
        raise CorruptPayload("a table of symbols is not padded with zeros")
    reader.at += -(-at // 8)
    return tables


def encode(symbols: Bytes, contexts: Bytes, kinds: int, tables: Tables | None = None) -> bytes:
    """Code symbols, each in one of `kinds` contexts, at most 64; `tables` as `tables_of` made them."""
    if not len(symbols):
        return b""
    size = len(symbols)
    tables = tables_of(counted(symbols, contexts, kinds), size) if tables is None else tables
    lanes = _lanes(size)
    out = np.empty(2 * size + 4 * lanes, dtype=np.uint8)
    start = rans_encode(symbols, contexts, tables.reshape(-1), _precision(size), lanes, out)
    return _written(tables) + out[start:].tobytes()


def decode(data: memoryview, contexts: Bytes, kinds: int) -> Bytes:
    """Invert `encode` for as many symbols as there are contexts; `data` ends with them.

    Raises:
        CorruptPayload: the bytes are no code of so many symbols.
    """
    size = len(contexts)
    symbols = np.empty(size, dtype=np.uint8)
    if not size:
        if len(data):
            raise CorruptPayload("symbols where none are due")
        return symbols
    reader, bits = Reader(data), _precision(size)
    tables = _read(reader, kinds, bits)
    code = np.frombuffer(reader.rest(), dtype=np.uint8)
    if not rans_decode(code, contexts, tables.reshape(-1), bits, _lanes(size), symbols):
        raise CorruptPayload("the code of the symbols is damaged")
    return symbols


def single(count: int) -> Bytes:
    """One context for `count` symbols."""
    return np.zeros(count, dtype=np.uint8)


def by_block(classes: Sequence[int] | Bytes, sizes: NDArray[np.int64]) -> Bytes:
    """The context of each symbol where all symbols of a block have one."""
    return np.repeat(np.asarray(classes, dtype=np.uint8), sizes)
