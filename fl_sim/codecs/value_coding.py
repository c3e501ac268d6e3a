"""Values as bytes: float32 as it is, float32 losslessly compressed, and lossy types that a config must ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from fl_sim.codecs import bits
from fl_sim.codecs.errors import CorruptPayload

Values = NDArray[np.float32]
WINDOW = 1 << 27
BLOCK = 4096


class ValueCoder(Protocol):
    """A value type: encodes and decodes the sparse values. `id` is its number in the payload."""

    @property
    def id(self) -> int:
        """Number on the wire."""

    def encode(self, values: Values, seed: int) -> bytes | memoryview:
        """Bytes of 1-D finite float32 values; `seed` feeds stochastic rounding.

        Raises:
            ValueError: a value that this type cannot hold.
        """

    def decode(self, data: memoryview, count: int) -> Values:
        """`count` values; `count` is known to the receiver.

        Raises:
            CorruptPayload: the bytes do not hold exactly that many.
        """


def raw(values: NDArray[np.generic]) -> memoryview:
    """An array's bytes, without copying where it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def shuffled(raw: memoryview, width: int) -> bytes:
    """zstd over the bytes of equal significance together: exponents repeat, mantissas do not."""
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(-1, width).T
    return zstandard.ZstdCompressor(level=1, write_content_size=True).compress(memoryview(planes.tobytes()))


def unshuffled(data: memoryview, width: int, size: int) -> bytes:
    """Invert `shuffled` into exactly `size` bytes. The frame must say that size before anything is allocated."""
    try:
        # zstandard ignores its own limit where a frame declares a size, so the declaration is checked first.
        frame = zstandard.get_frame_parameters(bytes(data[:18]))
        if frame.content_size != size or frame.window_size > max(WINDOW, size):
            raise CorruptPayload("compressed values declare another size")
        planes = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompress(
            bytes(data), max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CorruptPayload(f"compressed values are damaged: {error}") from error
    if len(planes) != size:
        raise CorruptPayload("compressed values have another size")
    return np.ascontiguousarray(np.frombuffer(planes, dtype=np.uint8).reshape(width, -1).T).tobytes()


@dataclass(frozen=True)
class Float32:
    """Exact, 4 bytes a value: the size is known in advance."""

    id: int = 0

    def encode(self, values: Values, seed: int) -> memoryview:
        return raw(values)

    def decode(self, data: memoryview, count: int) -> Values:
        if len(data) != 4 * count:
            raise CorruptPayload("float32 values have another length")
        return np.frombuffer(data, dtype="<f4")


@dataclass(frozen=True)
class Float32Zstd:
    """Lossless float32, compressed by zstandard: about 3.3 bytes for a trained weight, 2.8 for an exact difference."""

    id: int = 1

    def encode(self, values: Values, seed: int) -> bytes:
        return shuffled(raw(values), 4) if len(values) else b""

    def decode(self, data: memoryview, count: int) -> Values:
        return _exact(data, count, 4).view("<f4")


def _exact(data: memoryview, count: int, width: int) -> NDArray[np.uint8]:
    if count == 0 and len(data):
        raise CorruptPayload("values where none are due")
    return np.frombuffer(unshuffled(data, width, count * width) if count else b"", dtype=np.uint8)


@dataclass(frozen=True)
class Half:
    """Rounded to a 16-bit float, compressed."""

    id: int
    dtype: torch.dtype

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        short = torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype)
        if not bool(torch.isfinite(short).all()):
            raise ValueError(f"a value is beyond the range of {self.dtype}: {float(np.abs(values).max()):.6g}")
        return shuffled(raw(short.view(torch.uint8).numpy()), 2)

    def decode(self, data: memoryview, count: int) -> Values:
        raw = torch.from_numpy(_exact(data, count, 2).copy())
        return raw.view(self.dtype).float().numpy() if count else np.zeros(0, dtype=np.float32)


Counts = tuple[int, ...]
"""Values of each tensor, one after the other."""


def _block_sizes(counts: Counts) -> NDArray[np.int64]:
    """Values of each block: at most `BLOCK`, never of two tensors; no block for a tensor without values."""
    return np.array([min(BLOCK, n - at) for n in counts for at in range(0, n, BLOCK)], dtype=np.int64)


@dataclass(frozen=True)
class Rounded:
    """Integers -top..top by stochastic rounding, unbiased (QSGD; Alistarh et al., 2017), each block of values by its scale.

    A block is 4,096 values of one tensor or what is left of it; its scale is a float32. The integers are compressed as
    bytes: the fewer values there are, the fewer bits each takes.

    Attributes:
        id: number on the wire.
        top: the largest integer.
        counts: values of each tensor, known to both ends; empty = all values are one tensor's.
    """

    id: int
    top: int
    counts: Counts = ()

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        sizes = _block_sizes(self.counts or (len(values),))
        largest = np.maximum.reduceat(np.abs(values), np.cumsum(sizes) - sizes)
        scales = (largest / self.top).astype("<f4")
        safe = np.where(scales > 0, scales, 1).astype(np.float32)
        noise = np.random.default_rng(seed).random(len(values), dtype=np.float32)
        whole = np.clip(np.floor(values / np.repeat(safe, sizes) + noise), -self.top, self.top).astype(np.int8)
        head: bytes = scales.tobytes()
        return head + shuffled(raw(whole), 1)

    def decode(self, data: memoryview, count: int) -> Values:
        sizes = _block_sizes(self.counts or (count,))
        head = 4 * len(sizes)
        if len(data) < head:
            raise CorruptPayload("scales are cut off")
        scales = np.frombuffer(data[:head], dtype="<f4")
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise CorruptPayload("scales must be finite and not negative")
        whole = _exact(data[head:], count, 1).view(np.int8)
        if (whole < -self.top).any() or (whole > self.top).any():
            raise CorruptPayload(f"a rounded value is beyond {self.top}")
        with np.errstate(over="ignore"):  # what is not finite is refused with all other values
            restored: Values = whole.astype(np.float32) * np.repeat(scales, sizes)
        return restored


@dataclass(frozen=True)
class Largest:
    """The largest of every `one_in` values of a tensor as integers, at entropy-coded positions; the others arrive as 0.

    Unlike a mask it says nothing of what is pruned. Bytes: length of the positions (LEB128), positions, values.

    Attributes:
        id: number on the wire.
        one_in: of so many values of a tensor one is sent, rounded up.
        inner: how what is sent is coded.
        counts: values of each tensor, known to both ends; empty = all values are one tensor's.
    """

    id: int
    one_in: int
    inner: Rounded
    counts: Counts = ()

    def _kept(self, counts: Counts) -> tuple[Counts, Rounded]:
        """Counts of values sent of each tensor, and their coder."""
        kept = tuple(-(-count // self.one_in) for count in counts)
        return kept, replace(self.inner, counts=kept)

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        counts = self.counts or (len(values),)
        kept, inner = self._kept(counts)
        chosen = [_largest(part, keep) for part, keep in zip(_by_tensor(values, counts), kept, strict=True)]
        _, words = bits.encode(chosen)
        return b"".join([bits.varint(len(words)), words, inner.encode(values[np.concatenate(chosen)], seed)])

    def decode(self, data: memoryview, count: int) -> Values:
        restored = np.zeros(count, dtype=np.float32)
        if count == 0:
            if len(data):
                raise CorruptPayload("values where none are due")
            return restored
        counts = self.counts or (count,)
        kept, inner = self._kept(counts)
        reader = bits.Reader(data)
        start = reader.varint(len(data)) + reader.at
        chosen = bits.decode(data[reader.at : start], list(zip(kept, counts, strict=True)))
        restored[np.concatenate(chosen)] = inner.decode(data[start:], sum(kept))
        return restored


def _by_tensor(values: Values, counts: Counts) -> Sequence[Values]:
    return np.split(values, np.cumsum(counts)[:-1])


def _largest(values: Values, keep: int) -> NDArray[np.bool_]:
    """Positions of the `keep` largest magnitudes; of equal ones the first, so that bytes do not depend on how a machine sorts."""
    chosen = np.zeros(len(values), dtype=np.bool_)
    chosen[np.argsort(-np.abs(values), kind="stable")[:keep]] = True
    return chosen


VALUES: Mapping[str, ValueCoder] = {
    "float32": Float32(),
    "float32-zstd": Float32Zstd(),
    "float16": Half(2, torch.float16),
    "bfloat16": Half(3, torch.bfloat16),
    "int8": Rounded(4, 127),
    "int4": Rounded(5, 7),
    "int2": Rounded(6, 1),
    # 7 is a payload of several types, `fl_sim.codecs.mixed_coding`.
    "top25-int8": Largest(8, 4, Rounded(4, 127)),
    "top10-int8": Largest(9, 10, Rounded(4, 127)),
}
BY_TENSOR = (Rounded, Largest)
"""Coders that treat each tensor by itself: they are told how many values each has."""
BY_ID: Mapping[int, str] = {coder.id: name for name, coder in VALUES.items()}
EXACT = "float32"
COMPRESSED = frozenset(VALUES) - {EXACT}
