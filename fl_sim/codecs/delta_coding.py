"""16-bit floats as differences to the floats that the receiver holds, in units in the last place: exact for every float.

    scale of each tensor u8 | code of the lengths, LEB128 of its bytes before it | bits of the differences, of at most 65,536
    values of one tensor together, zeros up to a byte

Floats are compared as integers in the order of their values, so that a difference of n says that n - 1 floats lie between.
`w0 + (w1 - w0)` misses some values `w1`; an integer difference misses none, NaN and -0
included. A difference is cut into the length of its magnitude, which is entropy-coded, and its sign and the bits below the
leading one, which are as good as random and travel as they are.

What predicts the length: a change of size 2**s has about 2**(s - e) units in the last place where the base has the exponent
e. The changes of one tensor have about one size, so a length is coded in the context of (scale of its tensor - exponent of
its base).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fl_sim.codecs import symbol_coding
from fl_sim.codecs.bits import Reader, varint
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.symbol_coding import Bytes
from fl_sim.codecs.value_coder import Counts, Values, tensor_slices
from fl_sim.core.kernels.coding import float_join, float_split, pack_bits, unpack_bits

Words = NDArray[np.uint32]
SMALLEST = -4
"""The first context is for lengths of this prediction, and for what is shorter; the others are one bit of length apart."""


PIECE = 1 << 16


class Format(NamedTuple):
    """A float of 16 bits: the bits below its exponent, and its dtype in PyTorch."""

    mantissa: int
    dtype: torch.dtype

    def words(self, values: Values) -> Words:
        """Values rounded to this format, as their bits in 32."""
        short = torch.from_numpy(np.array(values, dtype=np.float32)).to(self.dtype)
        return short.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    def values(self, words: Words) -> Values:
        """Invert `words`."""
        return torch.from_numpy(words.astype(np.uint16).view(np.int16)).view(self.dtype).float().numpy()


FLOAT16, BFLOAT16 = Format(10, torch.float16), Format(7, torch.bfloat16)
WIDTH = 16
CONTEXTS = WIDTH + 4
"""Up to the longest differences that are probable."""


@dataclass(frozen=True)
class Delta:
    """Difference to the held values, in units in the last place of a float format, lossless but for the rounding to it.

    Attributes:
        id: number on the wire.
        format: the floats.
        counts: values of each tensor, known to both ends; empty = all values are one tensor's.
        base: the receiver's values at the same coordinates.
    """

    id: int
    format: Format
    counts: Counts = ()
    base: Values = field(default_factory=lambda: np.zeros(0, dtype=np.float32), compare=False)

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        mantissa, dtype = self.format
        size = len(values)
        words, base = self.format.words(values), self.format.words(self.base)
        if not np.isfinite(self.format.values(words)).all():
            raise ValueError(f"a value is beyond the range of {dtype}: {float(np.abs(values).max()):.6g}")
        lengths, contexts, extra = np.empty(size, np.uint8), np.empty(size, np.uint8), np.empty(PIECE, np.uint32)
        scales, out, at = bytearray(), np.empty(4 * size, dtype=np.uint8), 0
        for tensor in tensor_slices(self.counts, size):
            for piece in _pieces(tensor):
                part = extra[: piece.stop - piece.start]
                float_split(words[piece], base[piece], WIDTH, mantissa, lengths[piece], contexts[piece], part)
                at += pack_bits(part, lengths[piece], out[at:])
            scales.append(_scale(lengths[tensor], contexts[tensor]))
            contexts[tensor] = _contexts(scales[-1], contexts[tensor], CONTEXTS)
        code = symbol_coding.encode(lengths, contexts, CONTEXTS)
        return b"".join([scales, varint(len(code)), code, out[:at].data])

    def decode(self, data: memoryview, count: int) -> Values:
        if not count:
            if len(data):
                raise CorruptPayload("values where none are due")
            return np.zeros(0, dtype=np.float32)
        tensors = tensor_slices(self.counts, count)
        reader = Reader(data, len(tensors))
        end = reader.varint(len(data)) + reader.at
        base = self.format.words(self.base)
        mantissa = self.format.mantissa
        contexts = np.empty(count, dtype=np.uint8)
        for scale, tensor in zip(data, tensors, strict=False):
            for piece in _pieces(tensor):
                exponents = (base[piece] >> mantissa).astype(np.uint8)
                exponents &= (1 << (WIDTH - 1 - mantissa)) - 1
                contexts[piece] = _contexts(scale, exponents, CONTEXTS)
        lengths = symbol_coding.decode(data[reader.at : end], contexts, CONTEXTS, WIDTH + 1)
        stream, at = np.frombuffer(data[end:], dtype=np.uint8), 0
        words = np.empty(count, dtype=np.uint32)
        for piece in (piece for tensor in tensors for piece in _pieces(tensor)):
            total = int(lengths[piece].sum(dtype=np.int64))
            until = at + -(-total // 8)
            if until > len(stream) or (total % 8 and stream[until - 1] >> total % 8):
                raise CorruptPayload("the bits of the differences are cut off, or not padded with zeros")
            unpack_bits(stream[at:until], 0, lengths[piece], words[piece])
            float_join(words[piece], base[piece], lengths[piece], WIDTH)
            at = until
        if at != len(stream):
            raise CorruptPayload("the bits of the differences have another length")
        return self.format.values(words)


def _pieces(tensor: slice) -> Iterator[slice]:
    """Parts of a tensor that stay in the cache from one loop to the next."""
    for start in range(tensor.start, tensor.stop, PIECE):
        yield slice(start, min(tensor.stop, start + PIECE))


def _scale(lengths: Bytes, exponents: Bytes) -> int:
    """Mean of (length + exponent of the base) over what changed: the logarithm of the typical change."""
    changed = int(np.count_nonzero(lengths))
    total = int(lengths.sum(dtype=np.int64)) + int(exponents.sum(dtype=np.int64, where=lengths > 0))
    return min(255, (2 * total + changed) // (2 * changed)) if changed else 0


def _contexts(scale: int, exponents: Bytes, count: int) -> Bytes:
    """Context of each length: the length that its tensor's scale predicts."""
    table = np.clip(scale - np.arange(256) - SMALLEST, 0, count - 1).astype(np.uint8)
    contexts: Bytes = table[exponents]
    return contexts
