"""Bit segments through one range coder: each segment is coded as independent bits of one probability.

A segment of n bits with k ones is packed into bytes, and the bytes are coded with the 256-symbol product table of k/n:
within a fraction of a percent of log2 C(n, k) bits, at memory-like speed. Both ends build the table from the integers k
and n by multiplications only, because `pow` and `exp` differ in the last bit between C libraries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import constriction
import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.errors import CorruptPayload

Bits = NDArray[np.bool_]
ONES = np.array([bin(byte).count("1") for byte in range(256)])
SCALE, FLOOR = float(1 << 30), 64.0


def model(ones: int, size: int) -> constriction.stream.model.Categorical:
    """The byte model of a segment with `ones` of `size` bits set."""
    p, powers = ones / size, [[1.0], [1.0]]
    for _ in range(8):
        powers[0].append(powers[0][-1] * (1.0 - p))
        powers[1].append(powers[1][-1] * p)
    by_count = np.array([powers[1][c] * powers[0][8 - c] for c in range(9)])
    table = np.floor(by_count[ONES] * SCALE) + FLOOR
    return constriction.stream.model.Categorical(table, perfect=False)


def floor_bits(ones: int, size: int) -> float:
    """log2 C(size, ones): the fewest bits that tell which of the segment's bits are set."""
    if ones in (0, size):
        return 0.0
    return (math.lgamma(size + 1) - math.lgamma(ones + 1) - math.lgamma(size - ones + 1)) / math.log(2)


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
        value = shift = 0
        while True:
            if self.at >= len(self.data) or shift > 63:
                raise CorruptPayload("truncated number")
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        if value > limit:
            raise CorruptPayload(f"{value} where at most {limit} is possible")
        return value


def encode(segments: Iterable[Bits]) -> tuple[bytes, bytes]:
    """(counts, words) of bit segments, coded one after the other; empty segments leave no count."""
    coder = constriction.stream.queue.RangeEncoder()
    counts = bytearray()
    for segment in segments:
        ones = int(np.count_nonzero(segment))
        if len(segment):
            counts += varint(ones)
        if 0 < ones < len(segment):
            coder.encode(np.packbits(segment).astype(np.int32), model(ones, len(segment)))
    return bytes(counts), coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """The other end of `encode`: segments are asked for in the order in which they were given."""

    def __init__(self, words: memoryview) -> None:
        if len(words) % 4:
            raise CorruptPayload("mask words are cut off")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))

    def bits(self, ones: int, size: int) -> Bits:
        """The next segment: `size` bits, `ones` of them set.

        Raises:
            CorruptPayload: what is decoded does not have that many.
        """
        if ones in (0, size):
            return np.full(size, ones > 0)
        packed = self.symbols(model(ones, size), -(-size // 8)).astype(np.uint8)
        bits = np.unpackbits(packed).view(np.bool_)
        if bits[size:].any() or int(np.count_nonzero(bits)) != ones:
            raise CorruptPayload("a mask segment has another number of ones than it says")
        return bits[:size]

    def symbols(self, table: constriction.stream.model.Categorical, count: int) -> NDArray[np.int32]:
        """`count` symbols of a model; `count` comes from the schema, never from the payload."""
        try:
            return np.asarray(self._coder.decode(table, count), dtype=np.int32)
        except (AssertionError, ValueError) as error:
            raise CorruptPayload(f"mask words are invalid: {error}") from error

    def finish(self) -> None:
        """Refuse trailing words."""
        if not self._coder.maybe_exhausted():
            raise CorruptPayload("mask words are left over")
