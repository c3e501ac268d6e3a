"""A sparse bit vector as distances between its ones: the power-of-two class by the entropy coder, the rest as raw bits.

Independent bits have geometric gaps, and the bit models of `fl_sim.codecs.bits` are at their floor already. The mask of a
top-k update is clustered: its gap classes have a lower entropy than independent bits.
"""

from __future__ import annotations

import constriction
import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.bits import Bits, Decoder, Encoder, Reader, varint
from fl_sim.codecs.errors import CorruptPayload

DENSEST = 0.3
"""Above this share of ones, bit models are smaller, and the arrays of gaps would outgrow what they decode to."""


def _gaps(flat: Bits) -> NDArray[np.int64]:
    """Distances of at least 1 between consecutive ones; the first counts from before the vector."""
    return np.diff(np.flatnonzero(flat), prepend=-1)


def _classes(gaps: NDArray[np.int64]) -> NDArray[np.int32]:
    """floor(log2(gap)): exact, because gaps are far below 2**53."""
    return (np.frexp(gaps.astype(np.float64))[1] - 1).astype(np.int32)


def cost_bits(flat: Bits) -> float:
    """Predicted size in bits."""
    classes = _classes(_gaps(flat))
    counts = np.bincount(classes, minlength=1)
    used = counts[counts > 0]
    entropy = float(-(used * np.log2(used / used.sum())).sum())
    return entropy + float(classes.sum()) + 16.0 * len(counts)


def encode(flat: Bits) -> bytes:
    """number of classes, count of each (LEB128), length of the raw bits (LEB128), raw bits, words of the entropy coder."""
    gaps = _gaps(flat)
    classes = _classes(gaps)
    counts = np.bincount(classes, minlength=1)
    head = varint(len(counts)) + b"".join(varint(int(c)) for c in counts)
    raw = np.packbits(_low_bits(gaps, classes)).tobytes()
    coder = Encoder()
    if len(gaps) and len(counts) > 1:
        coder.symbols(classes, _model(counts))
    return head + varint(len(raw)) + raw + coder.words()


def decode(reader: Reader, *, size: int, ones: int) -> Bits:
    """Invert `encode` for a vector of `size` bits with `ones` ones, both known to the receiver.

    Raises:
        CorruptPayload: the gaps are not those of such a vector.
    """
    if ones > DENSEST * size:
        raise CorruptPayload("too many ones for gaps")
    counts = np.array([reader.varint(ones) for _ in range(reader.varint(size.bit_length()))], dtype=np.int64)
    powers = np.arange(len(counts), dtype=np.int64)
    # Gaps of class c are at least 2**c and all of them fit into the vector: this bounds what follows by `size`.
    if counts.sum() != ones or int((counts << powers).sum()) > size:
        raise CorruptPayload("gap classes do not add up")
    width = int((counts * powers).sum())
    if reader.varint(size) != -(-width // 8) or reader.at + -(-width // 8) > len(reader.data):
        raise CorruptPayload("gap bits have another length")
    raw = np.frombuffer(reader.data[reader.at : reader.at + -(-width // 8)], dtype=np.uint8)
    reader.at += len(raw)
    decoder = Decoder(reader.rest())
    classes = decoder.symbols(_model(counts), ones) if ones and len(counts) > 1 else np.zeros(ones, dtype=np.int32)
    decoder.finish()
    if not np.array_equal(np.bincount(classes, minlength=len(counts)), counts):
        raise CorruptPayload("gap classes are not those that were counted")
    stream = np.unpackbits(raw).view(np.bool_)
    if stream[width:].any():
        raise CorruptPayload("gap bits are not padded with zeros")
    positions = np.cumsum(_from_low_bits(stream[:width], classes)) - 1
    if ones and positions[-1] >= size:
        raise CorruptPayload("gaps run past the end")
    flat = np.zeros(size, dtype=np.bool_)
    flat[positions] = True
    return flat


def _model(counts: NDArray[np.int64]) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(counts.astype(np.float64) + 2.0**-10, perfect=False)


def _places(classes: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """For every raw bit: which gap it belongs to, and its weight's exponent, most significant first."""
    owner = np.repeat(np.arange(len(classes), dtype=np.int32), classes)
    exponent = np.cumsum(classes, dtype=np.int32)[owner]
    exponent -= 1 + np.arange(len(owner), dtype=np.int32)
    return owner, exponent


def _low_bits(gaps: NDArray[np.int64], classes: NDArray[np.int32]) -> Bits:
    """The bits of every gap below its leading one."""
    owner, exponent = _places(classes)
    return ((gaps[owner] >> exponent) & 1).astype(np.bool_)


def _from_low_bits(stream: Bits, classes: NDArray[np.int32]) -> NDArray[np.int64]:
    owner, exponent = _places(classes)
    gaps = np.int64(1) << classes.astype(np.int64)
    np.add.at(gaps, owner, stream.astype(np.int64) << exponent)
    return gaps
