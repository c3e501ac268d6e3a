"""Values as bytes: float32 as it is, float32 losslessly compressed, and lossy types that a config must ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """How the sparse values travel. `id` is its number on the wire."""

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
    """Exact, losslessly compressed: about 3.3 bytes a trained weight, 2.8 an exact difference."""

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


@dataclass(frozen=True)
class Rounded:
    """Integers -top..top by stochastic rounding, unbiased (QSGD; Alistarh et al., 2017), a float32 scale per 4,096 values.

    They are compressed as bytes: the fewer values there are, the fewer bits each takes.
    """

    id: int
    top: int

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        blocks = _blocks(values)
        scales = (np.abs(blocks).max(axis=1) / self.top).astype("<f4")
        safe = np.where(scales > 0, scales, 1).astype(np.float32)
        noise = np.random.default_rng(seed).random(blocks.shape, dtype=np.float32)
        whole = np.clip(np.floor(blocks / safe[:, None] + noise), -self.top, self.top).astype(np.int8)
        quantised = whole.reshape(-1)[: len(values)]
        head: bytes = scales.tobytes()
        return head + shuffled(raw(quantised), 1)

    def decode(self, data: memoryview, count: int) -> Values:
        head = 4 * -(-count // BLOCK)
        if len(data) < head:
            raise CorruptPayload("scales are cut off")
        scales = np.frombuffer(data[:head], dtype="<f4")
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise CorruptPayload("scales must be finite and not negative")
        whole = _exact(data[head:], count, 1).view(np.int8)
        if (whole < -self.top).any() or (whole > self.top).any():
            raise CorruptPayload(f"a rounded value is beyond {self.top}")
        with np.errstate(over="ignore"):  # what is not finite is refused with all other values
            restored: Values = (_blocks(whole.astype(np.float32)) * scales[:, None]).reshape(-1)[:count]
        return restored


def _blocks(values: Values) -> Values:
    """(blocks, 4096), zero-padded."""
    padded = np.zeros(-(-len(values) // BLOCK) * BLOCK, dtype=np.float32)
    padded[: len(values)] = values
    return padded.reshape(-1, BLOCK)


@dataclass(frozen=True)
class Largest:
    """The largest of every `one_in` values in another type, at positions that are entropy-coded; the others arrive as 0.

    Unlike a mask it says nothing of what is pruned. Bytes: length of the positions (LEB128), positions, values.
    """

    id: int
    one_in: int
    inner: ValueCoder

    def _kept(self, count: int) -> int:
        return -(-count // self.one_in)

    def encode(self, values: Values, seed: int) -> bytes:
        if not len(values):
            return b""
        chosen = np.zeros(len(values), dtype=np.bool_)
        # Stable: of equal magnitudes the first, so that the bytes do not depend on how a machine sorts.
        chosen[np.argsort(-np.abs(values), kind="stable")[: self._kept(len(values))]] = True
        _, words = bits.encode([chosen])
        return b"".join([bits.varint(len(words)), words, self.inner.encode(values[chosen], seed)])

    def decode(self, data: memoryview, count: int) -> Values:
        restored = np.zeros(count, dtype=np.float32)
        if count == 0:
            if len(data):
                raise CorruptPayload("values where none are due")
            return restored
        reader = bits.Reader(data)
        start = reader.varint(len(data)) + reader.at
        (chosen,) = bits.decode(data[reader.at : start], [(self._kept(count), count)])
        restored[chosen] = self.inner.decode(data[start:], self._kept(count))
        return restored


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
BY_ID: Mapping[int, str] = {coder.id: name for name, coder in VALUES.items()}
EXACT = "float32"
COMPRESSED = frozenset(VALUES) - {EXACT}
