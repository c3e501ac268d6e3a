"""Masks as bytes. Seven ways; the encoder takes the smallest for the mask at hand.

| mode  | codes                                                       | wins for                              |
|-------|-------------------------------------------------------------|---------------------------------------|
| held  | nothing: an 8-byte hash of the mask the receiver holds      | training under a known mask           |
| whole | the bits of each tensor                                     | a first mask                          |
| rows  | live and full flags of output channels, bits of mixed rows  | structured masks                      |
| split | the bits where the held mask is set, then those where not   | a few swaps against a sparse mask     |
| xor   | the bits that differ from the held mask                     | a few swaps against a dense mask      |
| gaps  | distances between ones, by power-of-two class               | clustered masks of top-k updates      |
| contexts | each bit given its row, channel, kernel and neighbours   | the same, in fewer bytes, not as fast |

`contexts` takes a multiple of the time of the others and is tried only where it is asked for. All
but `held` start with the number of ones of every coded segment (LEB128), from which both ends build their models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.codecs import bits, context_coding, gap_coding
from fl_sim.codecs.bits import Bits, Reader, floor_bits
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.core.types import FlatMask, Mask

Layout = tuple[tuple[int, int, int], ...]
"""(rows, elements, elements of a kernel) of each prunable tensor; rows = output channels."""


def mask_hash(mask: Mask) -> bytes:
    """Eight bytes that name a mask, whatever dict holds it: two ends compare them before a mask is left out."""
    return flat_hash((mask if isinstance(mask, FlatMask) else FlatMask.pack(mask)).flat)


def flat_hash(flat: Tensor) -> bytes:
    """`mask_hash` of a mask as one bool vector."""
    return xxhash.xxh3_64_digest(np.packbits(flat.numpy()).tobytes() + len(flat).to_bytes(8, "little"))


def _tensors(flat: Bits, layout: Layout) -> Iterator[Bits]:
    at = 0
    for _, size, _ in layout:
        yield flat[at : at + size]
        at += size


def _joined(parts: list[Bits]) -> Bits:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)


def _count(reader: Reader, size: int) -> int:
    """The number of ones of a segment; an empty segment has none and is not counted."""
    return reader.varint(size) if size else 0


def _cost(segments: Iterable[tuple[int, int]]) -> float:
    """Predicted bits of coded segments given as (ones, size): the floor, and a byte for each count."""
    total = 0.0
    for ones, size in segments:
        total += floor_bits(ones, size) + (8 if size < 128 else 16)
    return total


# -- whole -------------------------------------------------------------------------------------------------------------


def _whole_encode(flat: Bits, layout: Layout, held: Bits | None) -> bytes:
    return b"".join(bits.encode(_tensors(flat, layout)))


def _whole_decode(reader: Reader, layout: Layout, held: Bits | None) -> Bits:
    segments = list(_whole_segments(reader, layout, held))
    return _joined(bits.decode(reader.rest(), segments))


def _whole_segments(reader: Reader, layout: Layout, held: Bits | None) -> Iterator[tuple[int, int]]:
    return ((_count(reader, size), size) for _, size, _ in layout)


# -- rows --------------------------------------------------------------------------------------------------------------


def _row_parts(part: Bits, rows: int) -> tuple[Bits, Bits, Bits]:
    """(live flags of rows, full flags of live rows, bits of the rows that are neither empty nor full)."""
    table = part.reshape(rows, -1)
    live: Bits = np.asarray(table.any(axis=1))
    full: Bits = np.asarray(table.all(axis=1))
    return live, full[live], table[live & ~full].reshape(-1)


def _rows_encode(flat: Bits, layout: Layout, held: Bits | None) -> bytes:
    parts = [_row_parts(p, rows) for p, (rows, size, _) in zip(_tensors(flat, layout), layout, strict=True) if size]
    live_counts, live_words = bits.encode(live for live, _, _ in parts)
    full = sum(int(np.count_nonzero(full)) for _, full, _ in parts)
    if full == sum(len(full) for _, full, _ in parts):
        return live_counts + bits.varint(full) + live_words
    counts, words = bits.encode(segment for part in parts for segment in part)
    return live_counts + bits.varint(full) + counts + words


RowCounts = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def _rows_counts(reader: Reader, layout: Layout) -> list[RowCounts]:
    """(ones, size) of the three segments of every tensor: live rows, full rows among them, bits of the mixed rows.

    Channel masks have full rows only: one number says so, and nothing more is counted. Otherwise all counts follow.
    """
    tensors = [(rows, size) for rows, size, _ in layout if size]
    live = [reader.varint(rows) for rows, _ in tensors]
    if reader.varint(sum(live)) == sum(live):
        return [((k, rows), (k, k), (0, 0)) for k, (rows, _) in zip(live, tensors, strict=True)]
    made: list[RowCounts] = []
    for rows, size in tensors:
        alive = reader.varint(rows)
        full = reader.varint(alive) if alive else 0
        mixed = (alive - full) * (size // rows)
        made.append(((alive, rows), (full, alive), (reader.varint(mixed) if mixed else 0, mixed)))
    return made


def _rows_decode(reader: Reader, layout: Layout, held: Bits | None) -> Bits:
    segments = list(_rows_segments(reader, layout, held))
    decoded = bits.decode(reader.rest(), segments)
    parts = []
    tensors = (entry[:2] for entry in layout if entry[1])
    for (rows, size), live, full, mixed in zip(tensors, decoded[0::3], decoded[1::3], decoded[2::3], strict=True):
        table = np.zeros((rows, size // rows), dtype=np.bool_)
        chosen = np.flatnonzero(live)
        table[chosen[full]] = True
        table[chosen[~full]] = mixed.reshape(-1, size // rows)
        parts.append(table.reshape(-1))
    return _joined(parts)


def _rows_segments(reader: Reader, layout: Layout, held: Bits | None) -> Iterator[tuple[int, int]]:
    return (segment for three in _rows_counts(reader, layout) for segment in three)


# -- split, xor --------------------------------------------------------------------------------------------------------


def _sides(flat: Bits, layout: Layout, held: Bits) -> Iterator[Bits]:
    for part, before in zip(_tensors(flat, layout), _tensors(held, layout), strict=True):
        yield part[before]
        yield part[~before]


def _side_sizes(layout: Layout, held: Bits) -> list[int]:
    sizes = []
    for before in _tensors(held, layout):
        alive = int(np.count_nonzero(before))
        sizes += [alive, len(before) - alive]
    return sizes


def _split_encode(flat: Bits, layout: Layout, held: Bits | None) -> bytes:
    assert held is not None
    return b"".join(bits.encode(_sides(flat, layout, held)))


def _split_decode(reader: Reader, layout: Layout, held: Bits | None) -> Bits:
    assert held is not None
    segments = list(_split_segments(reader, layout, held))
    sides = bits.decode(reader.rest(), segments)
    flat = np.empty_like(held)
    for part, before, kept, grown in zip(
        _tensors(flat, layout), _tensors(held, layout), sides[0::2], sides[1::2], strict=True
    ):
        part[before] = kept
        part[~before] = grown
    return flat


def _split_segments(reader: Reader, layout: Layout, held: Bits | None) -> Iterator[tuple[int, int]]:
    assert held is not None
    return ((_count(reader, size), size) for size in _side_sizes(layout, held))


def _xor_encode(flat: Bits, layout: Layout, held: Bits | None) -> bytes:
    assert held is not None
    return _whole_encode(flat ^ held, layout, None)


def _xor_decode(reader: Reader, layout: Layout, held: Bits | None) -> Bits:
    assert held is not None
    return _whole_decode(reader, layout, None) ^ held


# -- gaps --------------------------------------------------------------------------------------------------------------


def _gaps_encode(flat: Bits, layout: Layout, held: Bits | None) -> bytes:
    counts = b"".join(bits.varint(int(np.count_nonzero(part))) for part in _tensors(flat, layout) if len(part))
    return counts + gap_coding.encode(flat)


def _gaps_decode(reader: Reader, layout: Layout, held: Bits | None) -> Bits:
    ones = [_count(reader, size) for _, size, _ in layout]
    flat = gap_coding.decode(reader, size=sum(size for _, size, _ in layout), ones=sum(ones))
    if [int(np.count_nonzero(part)) for part in _tensors(flat, layout)] != ones:
        raise CorruptPayload("gaps do not land in the tensors they say")
    return flat


# -- contexts ----------------------------------------------------------------------------------------------------------


def _shapes(layout: Layout) -> context_coding.Shapes:
    return tuple((rows, size // (rows * kernel) if size else 0, kernel) for rows, size, kernel in layout)


def smaller(flat: Bits, layout: Layout, than: int) -> bytes | None:
    """The mask in mode `contexts` if that takes less than so many bytes, else None."""
    return context_coding.encode(flat, _shapes(layout), than - 1) if than else None


def _contexts_encode(flat: Bits, layout: Layout, held: Bits | None) -> bytes:
    # Half a byte a bit and some for each tensor: more than the coder can write.
    code = context_coding.encode(flat, _shapes(layout), 4 * len(flat) + 16 * len(layout) + 16)
    assert code is not None
    return code


def _contexts_decode(reader: Reader, layout: Layout, held: Bits | None) -> Bits:
    return context_coding.decode(reader, _shapes(layout))


# -- the table, and the choice -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """A mask codec.

    Attributes:
        id: its number on the wire.
        relative: whether both ends need the held mask.
        encode, decode: flat mask -> bytes and back.
        segments: (ones, size) of each coded segment, read from the counts alone.
    """

    id: int
    relative: bool
    encode: Callable[[Bits, Layout, Bits | None], bytes]
    decode: Callable[[Reader, Layout, Bits | None], Bits]
    segments: Callable[[Reader, Layout, Bits | None], Iterator[tuple[int, int]]]


CONTEXTS = "contexts"
MODES: Mapping[str, Mode] = {
    "whole": Mode(2, False, _whole_encode, _whole_decode, _whole_segments),
    "rows": Mode(3, False, _rows_encode, _rows_decode, _rows_segments),
    "split": Mode(4, True, _split_encode, _split_decode, _split_segments),
    "xor": Mode(5, True, _xor_encode, _xor_decode, _whole_segments),
    "gaps": Mode(6, False, _gaps_encode, _gaps_decode, _whole_segments),
    CONTEXTS: Mode(7, False, _contexts_encode, _contexts_decode, _whole_segments),
}


class _Counted(NamedTuple):
    """What a mask's predicted bytes depend on: of each tensor the ones, the rows that are not empty and those that are full; and
    the neighbours that are alive together, where ones are so few that somebody asks."""

    ones: list[int]
    live: list[int]
    full: list[int]
    pairs: int


def _counted(flat: Bits, layout: Layout) -> _Counted:
    """Of one mask; the rows are looked at once for what is asked of them."""
    ones, live, full = list[int](), list[int](), list[int]()
    for part, (rows, size, _) in zip(_tensors(flat, layout), layout, strict=True):
        ones.append(int(np.count_nonzero(part)))
        table = part.reshape(rows, -1) if size else part.reshape(0, 1)
        live.append(int(np.count_nonzero(np.logical_or.reduce(table, axis=1))))
        full.append(int(np.count_nonzero(np.logical_and.reduce(table, axis=1))) if ones[-1] >= table.shape[1] else 0)
    few = 0 < sum(ones) < gap_coding.DENSEST * len(flat)
    return _Counted(ones, live, full, int(np.count_nonzero(flat[1:] & flat[:-1])) if few else 0)


def _counted_all(flat: Bits, layout: Layout) -> list[_Counted]:
    """`_counted` of each of several masks, (masks, elements)."""
    ones, live, full = list[NDArray[np.int64]](), list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    for part, (rows, size, _) in zip(_columns(flat, layout), layout, strict=True):
        table = part.reshape(len(flat), rows, -1) if size else part.reshape(len(flat), 0, 1)
        ones.append(np.count_nonzero(part, axis=1))
        live.append(np.count_nonzero(np.logical_or.reduce(table, axis=2), axis=1))
        full.append(np.count_nonzero(np.logical_and.reduce(table, axis=2), axis=1))
    pairs = np.count_nonzero(flat[:, 1:] & flat[:, :-1], axis=1)
    return list(map(_Counted, *(np.stack(counts, axis=1).tolist() for counts in (ones, live, full)), pairs.tolist()))


def _columns(flat: Bits, layout: Layout) -> list[Bits]:
    """The tensors of several masks."""
    return np.split(flat, np.cumsum([size for _, size, _ in layout])[:-1], axis=1)


def choose(flat: Bits, layout: Layout, held: Bits | None) -> str:
    """The mode with the fewest predicted bytes; predictions need popcounts only, gaps a histogram."""
    return _chosen(flat, _counted(flat, layout), layout, held)


def _chosen(flat: Bits, counted: _Counted, layout: Layout, held: Bits | None) -> str:
    ones, sizes = counted.ones, [size for _, size, _ in layout]
    costs = {"whole": _cost(zip(ones, sizes, strict=True)), "rows": _rows_cost(counted, layout)}
    if held is not None:
        changed = [int(np.count_nonzero(part)) for part in _tensors(flat ^ held, layout)]
        costs["xor"] = _cost(zip(changed, sizes, strict=True))
        both = [int(np.count_nonzero(part)) for part in _tensors(flat & held, layout)]
        sides = _side_sizes(layout, held)
        split = [k for pair in zip(both, (o - b for o, b in zip(ones, both, strict=True)), strict=True) for k in pair]
        costs["split"] = _cost(zip(split, sides, strict=True))
    if 0 < sum(ones) < gap_coding.DENSEST * len(flat) and _clustered(counted, sizes):
        costs["gaps"] = gap_coding.cost_bits(flat) + 16 * len(layout)
    return min(costs, key=costs.__getitem__)


def _clustered(counted: _Counted, sizes: list[int]) -> bool:
    """Whether neighbours are alive together more often than independent bits would be; cheaper than the gaps' histogram."""
    independent = sum(k * k / size for k, size in zip(counted.ones, sizes, strict=True) if size)
    return counted.pairs > 1.2 * independent + 2


def _rows_cost(counted: _Counted, layout: Layout) -> float:
    total, useful = 0.0, False
    for k, live, full, (rows, size, _) in zip(counted.ones, counted.live, counted.full, layout, strict=True):
        if size:
            width = size // rows
            useful = useful or live < rows or full > 0
            total += _cost([(live, rows)])
            if full < live:
                total += _cost([(full, live), (k - full * width, (live - full) * width)]) + 8
    return total if useful else float("inf")


def encode_all(flat: Bits, layout: Layout) -> list[tuple[int, bytes]]:
    """(mode, bytes) of several masks, (masks, elements), of which the receiver holds none: what `encode` makes of each. Those of
    which `whole` is chosen and no tensor is all or nothing are cut into words together."""
    counted = _counted_all(flat, layout)
    modes = [_chosen(row, each, layout, None) for row, each in zip(flat, counted, strict=True)]
    sizes, ones = [size for _, size, _ in layout], np.array([each.ones for each in counted])
    simple: Bits = np.logical_and.reduce((ones > 0) & (ones < sizes), axis=1) & (np.array(modes) == "whole")
    parts = [part[simple] for part in _columns(flat, layout)]
    whole = iter(bits.encode_all(parts, ones[simple]) if simple.any() else ())
    return [
        (MODES[mode].id, next(whole) if plain else MODES[mode].encode(row, layout, None))
        for mode, plain, row in zip(modes, simple, flat, strict=True)
    ]


def decode_all(mode: int, data: Sequence[memoryview], layout: Layout) -> Bits | None:
    """Several masks of one mode, (masks, elements), of which the receiver holds none; None where each is to be decoded by itself:
    in other modes than `whole`, and where a tensor is all or nothing.

    Raises:
        CorruptPayload: one of them is no mask.
    """
    if mode != MODES["whole"].id:
        return None
    sizes, readers = [size for _, size, _ in layout], [Reader(each) for each in data]
    ones = np.array([[_count(reader, size) for size in sizes] for reader in readers], dtype=np.int64)
    if not np.logical_and.reduce((ones > 0) & (ones < sizes), axis=None):
        return None
    return bits.decode_all([reader.rest() for reader in readers], ones, sizes)


def encode(flat: Bits, layout: Layout, held: Bits | None = None) -> tuple[int, bytes]:
    """(mode, bytes) of a mask in the mode of the fewest predicted bytes."""
    mode = MODES[choose(flat, layout, held)]
    return mode.id, mode.encode(flat, layout, held)
