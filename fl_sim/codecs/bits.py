"""Bit segments through one entropy coder: each segment is coded as independent bits of one probability.

A segment of n bits with k ones is cut into words of 16 bits. A word is how many of its bits are set, coded with the binomial
table of k/n, and which of the words with as many that is, all of them equally likely (enumerative coding; Cover, 1973):
within a fraction of a percent of log2 C(n, k) bits together. That is two symbols for 16 bits from tables of 17, which an
ANS coder (Duda, 2013) reads two to three times as fast as two bytes from tables of 256.
Both ends build the tables from the integers k and n by multiplications only, because `pow` and `exp` differ in the last bit
between C libraries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import constriction
import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.errors import CorruptPayload

Bits = NDArray[np.bool_]
Words = NDArray[np.uint16]
Symbols = NDArray[np.int32]
Segment = tuple[int, int]
"""(ones, size) of a run of bits."""
WORD = 16
_BYTE = np.zeros(1, np.uint8)
_EVEN = constriction.stream.model.Uniform()
SCALE, FLOOR = float(1 << 30), 64.0


class _Words(NamedTuple):
    """Lookup tables of all 16-bit words by population count: `counts` and `ranks` by word, `sizes` and `starts` by count."""

    counts: NDArray[np.uint8]
    ranks: Symbols
    sizes: Symbols
    starts: Symbols
    ordered: Words


@cache
def _words() -> _Words:
    counts = (
        np.unpackbits(np.arange(1 << WORD, dtype="<u2").view(np.uint8)).reshape(-1, WORD).sum(axis=1, dtype=np.uint8)
    )
    ordered = np.argsort(counts, kind="stable")
    sizes = np.bincount(counts).astype(np.int32)
    starts = (np.cumsum(sizes) - sizes).astype(np.int32)
    ranks = np.empty(1 << WORD, dtype=np.int32)
    ranks[ordered] = np.arange(1 << WORD) - starts[counts[ordered]]
    return _Words(counts, ranks, sizes, starts, ordered.astype("<u2"))


@lru_cache(maxsize=1024)
def _model(ones: int, size: int) -> constriction.stream.model.Categorical:
    """Of a segment, how likely it is that 0..16 of a word's bits are set. Clients of one model have the same sizes, and ones that
    differ by some tens where each chooses what it sends."""
    p = ones / size
    set_, unset = np.ones((2, WORD + 1))
    set_[1:], unset[1:] = p, 1.0 - p
    likely = _words().sizes * np.cumprod(set_) * np.cumprod(unset)[::-1]
    # `lazy` changes no byte: where a word has less than one bit on average, searching from 0 upwards is the faster way.
    return constriction.stream.model.Categorical(
        np.floor(likely * SCALE) + FLOOR, lazy=WORD * ones < size, perfect=False
    )


@lru_cache(maxsize=4096)
def floor_bits(ones: int, size: int) -> float:
    """log2 C(size, ones): the fewest bits that tell which of the segment's bits are set."""
    if ones in (0, size):
        return 0.0
    return (math.lgamma(size + 1) - math.lgamma(ones + 1) - math.lgamma(size - ones + 1)) / math.log(2)


@lru_cache(maxsize=1024)
def varint(value: int) -> bytes:
    """LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Reads varints from the front of a buffer."""

    def __init__(self, data: memoryview, at: int = 0) -> None:
        self.data, self.at = data, at

    def varint(self, limit: int) -> int:
        """The next varint.

        Raises:
            CorruptPayload: the data ends, or the number exceeds `limit`.
        """
        data, at, value = self.data, self.at, 0
        for shift in range(0, 64, 7):
            if at >= len(data):
                raise CorruptPayload("truncated number")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        else:
            raise CorruptPayload("truncated number")
        self.at = at
        if value > limit:
            raise CorruptPayload(f"{value} where at most {limit} is possible")
        return value

    def rest(self) -> memoryview:
        """Bytes that were not read yet."""
        return self.data[self.at :]


def _cut(segment: Bits) -> Words:
    packed = np.packbits(segment)
    return (np.concatenate((packed, _BYTE)) if len(packed) % 2 else packed).view("<u2")


def encode(segments: Iterable[Bits]) -> tuple[bytes, bytes]:
    """(counts, words) of bit segments, coded one after the other; empty segments leave no count."""
    head, coded, cut = bytearray(), [], []
    for segment in segments:
        ones = int(np.count_nonzero(segment))
        if len(segment):
            head += varint(ones)
        if 0 < ones < len(segment):
            coded.append((ones, len(segment)))
            cut.append(_cut(segment))
    return bytes(head), _coded(coded, cut) if cut else b""


def _coded(segments: Sequence[Segment], cut: Sequence[Words]) -> bytes:
    words, coder = _words(), Encoder()
    joined = np.concatenate(cut)
    sizes = words.sizes[words.counts[joined]]
    several = sizes > 1
    # Last in, first out: what is decoded last goes in first.
    coder.choices(words.ranks[joined[several]], sizes[several])
    for part, segment in zip(reversed(cut), reversed(segments), strict=True):
        coder.symbols(words.counts[part].astype(np.int32), _model(*segment))
    return coder.words()


def encode_all(parts: Sequence[Bits], ones: NDArray[np.int64]) -> list[bytes]:
    """Counts and words, joined, of several vectors, each cut into the same segments: `encode` of each.

    Args:
        parts: the segments, bool (vectors, size) each.
        ones: how many bits of each are set, (vectors, segments); neither none nor all.
    """
    words, cut = _words(), [_cut_all(part) for part in parts]
    ends = np.cumsum([part.shape[1] for part in cut]).tolist()
    joined = np.concatenate(cut, axis=1)
    counts = words.counts[joined].astype(np.int32)
    sizes, ranks = words.sizes[counts], words.ranks[joined]
    several = sizes > 1
    places = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    segments = list(zip(places, [part.shape[1] for part in parts], strict=True))
    made = []
    for i, mine in enumerate(ones.tolist()):
        coder, where = Encoder(), several[i]
        coder.choices(ranks[i][where], sizes[i][where])
        for (place, size), count in zip(reversed(segments), reversed(mine), strict=True):
            coder.symbols(counts[i, place], _model(count, size))
        made.append(b"".join([*map(varint, mine), coder.words()]))
    return made


def _cut_all(part: Bits) -> Words:
    """`_cut` of each row."""
    packed = np.packbits(part, axis=1)
    return (np.pad(packed, ((0, 0), (0, 1))) if packed.shape[1] % 2 else packed).view("<u2")


def decode(words: memoryview, segments: Sequence[Segment]) -> list[Bits]:
    """Invert `encode` for segments whose ones and sizes the receiver knows.

    Raises:
        CorruptPayload: the words are not those of such segments.
    """
    coded = [(ones, size) for ones, size in segments if 0 < ones < size]
    decoder = Decoder(words)
    flat = _decoded(coded, decoder) if coded else np.zeros(0, dtype=np.bool_)
    decoder.finish()
    parts, at = [], 0
    for ones, size in segments:
        if not 0 < ones < size:
            parts.append(np.full(size, ones > 0))
            continue
        end = at + -(-size // WORD) * WORD
        parts.append(flat[at : at + size])
        if at + size < end and np.count_nonzero(flat[at + size : end]):
            raise CorruptPayload("a mask segment is not padded with zeros")
        at = end
    return parts


def _decoded(segments: Sequence[Segment], decoder: Decoder) -> Bits:
    """The segments' bits one after the other, each padded to whole words."""
    words, lengths = _words(), [-(-size // WORD) for _, size in segments]
    counts = np.concatenate(
        [decoder.symbols(_model(*segment), length) for segment, length in zip(segments, lengths, strict=True)]
    )
    starts = [0, *accumulate(lengths[:-1])]
    if np.add.reduceat(counts, starts).tolist() != [ones for ones, _ in segments]:
        raise CorruptPayload("a mask segment has another number of ones than it says")
    places, sizes = words.starts[counts], words.sizes[counts]
    (several,) = (sizes > 1).nonzero()
    places[several] += decoder.choices(sizes[several])
    return np.unpackbits(words.ordered[places].view(np.uint8)).view(np.bool_)


def decode_all(words: Sequence[memoryview], ones: NDArray[np.int64], sizes: Sequence[int]) -> Bits:
    """Invert `encode_all` for vectors of which the receiver knows the ones, (vectors, segments), and the segments' sizes.

    Raises:
        CorruptPayload: the words of one of them are not those of such segments.
    """
    table, lengths = _words(), [-(-size // WORD) for size in sizes]
    starts = [0, *accumulate(lengths)]
    places = [slice(start, end) for start, end in pairwise(starts)]
    counts, decoders = np.empty((len(words), starts[-1]), dtype=np.int32), [Decoder(each) for each in words]
    for row, mine, decoder in zip(counts, ones.tolist(), decoders, strict=True):
        for place, count, size, length in zip(places, mine, sizes, lengths, strict=True):
            row[place] = decoder.symbols(_model(count, size), length)
    if (np.add.reduceat(counts, starts[:-1], axis=1) != ones).any():
        raise CorruptPayload("a mask segment has another number of ones than it says")
    found, among = table.starts[counts], table.sizes[counts]
    several = among > 1
    parts = np.split(among[several], np.cumsum(np.count_nonzero(several, axis=1))[:-1])
    found[several] += np.concatenate([decoder.choices(each) for decoder, each in zip(decoders, parts, strict=True)])
    for decoder in decoders:
        decoder.finish()
    padded = np.unpackbits(table.ordered[found].view(np.uint8), axis=1).view(np.bool_)
    segments = [padded[:, WORD * place.start : WORD * place.stop] for place in places]
    if any(segment[:, size:].any() for segment, size in zip(segments, sizes, strict=True)):
        raise CorruptPayload("a mask segment is not padded with zeros")
    return np.concatenate([segment[:, :size] for segment, size in zip(segments, sizes, strict=True)], axis=1)


class Encoder:
    """An ANS coder: what is put in last comes out first."""

    def __init__(self) -> None:
        self._coder = constriction.stream.stack.AnsCoder()

    def symbols(self, symbols: Symbols, model: constriction.stream.model.Categorical) -> None:
        """Symbols of one model."""
        self._coder.encode_reverse(symbols, model)

    def choices(self, chosen: Symbols, sizes: Symbols) -> None:
        """For each size one of 0..size-1, all equally likely; sizes are at least 2."""
        self._coder.encode_reverse(chosen, _EVEN, sizes)

    def words(self) -> bytes:
        """All bytes written so far."""
        made: bytes = self._coder.get_compressed().astype("<u4").tobytes()
        return made


class Decoder:
    """The other end of `Encoder`. How much is asked for comes from the schema, never from the payload."""

    def __init__(self, words: memoryview) -> None:
        if len(words) % 4:
            raise CorruptPayload("mask words are cut off")
        try:
            self._coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
        except ValueError as error:
            raise CorruptPayload(f"mask words are invalid: {error}") from error

    def symbols(self, model: constriction.stream.model.Categorical, count: int) -> Symbols:
        """`count` symbols of a model."""
        return np.asarray(self._coder.decode(model, count), dtype=np.int32)

    def choices(self, sizes: Symbols) -> Symbols:
        """For each size, at least 2, one of 0..size-1."""
        return np.asarray(self._coder.decode(_EVEN, sizes), dtype=np.int32)

    def finish(self) -> None:
        """Refuse what is left over."""
        if not self._coder.is_empty():
            raise CorruptPayload("mask words are left over")
