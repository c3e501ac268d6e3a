"""Floats as bytes: float32 as it is, float32 losslessly compressed, 16 bits rounded and compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.plane_coding import exact_bytes, exact_rows, raw, shuffled, shuffled_all
from fl_sim.codecs.value_coder import Values


@dataclass(frozen=True)
class Float32:
    """Exact, 4 bytes a value: the size is known in advance."""

    id: int = 0

    def encode(self, values: Values, seed: int) -> memoryview:
        return raw(values)

    def encode_all(self, values: Values, seeds: Sequence[int]) -> list[bytes]:
        """See `Together`."""
        return [row.tobytes() for row in np.asarray(values, dtype="<f4")]

    def decode(self, data: memoryview, count: int) -> Values:
        if len(data) != 4 * count:
            raise CorruptPayload("float32 values have another length")
        return np.frombuffer(data, dtype="<f4")

    def decode_all(self, data: Sequence[memoryview], count: int) -> Values:
        """See `Together`."""
        if any(len(each) != 4 * count for each in data):
            raise CorruptPayload("float32 values have another length")
        return np.frombuffer(b"".join(data), dtype="<f4").reshape(len(data), count)


@dataclass(frozen=True)
class Float32Zstd:
    """Lossless float32, compressed by zstandard: about 3.3 bytes for a trained weight, 2.8 for an exact difference."""

    id: int = 1

    def encode(self, values: Values, seed: int) -> bytes:
        return shuffled(raw(values), 4) if len(values) else b""

    def encode_all(self, values: Values, seeds: Sequence[int]) -> list[bytes]:
        """See `Together`."""
        return shuffled_all(_bytes_of(values), 4) if values.shape[1] else [b""] * len(values)

    def decode(self, data: memoryview, count: int) -> Values:
        return exact_bytes(data, count, 4).view("<f4")

    def decode_all(self, data: Sequence[memoryview], count: int) -> Values:
        """See `Together`."""
        return exact_rows(data, count, 4).view("<f4")


@dataclass(frozen=True)
class Half:
    """Rounded to a 16-bit float, compressed."""

    id: int
    dtype: torch.dtype

    def encode(self, values: Values, seed: int) -> bytes:
        return self.encode_all(values[np.newaxis], (seed,))[0]

    def encode_all(self, values: Values, seeds: Sequence[int]) -> list[bytes]:
        """See `Together`."""
        if not values.size:
            return [b""] * len(values)
        short = torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype)
        if not bool(torch.isfinite(short).all()):
            raise ValueError(f"a value is beyond the range of {self.dtype}: {float(np.abs(values).max()):.6g}")
        return shuffled_all(short.view(torch.uint8).numpy(), 2)

    def decode(self, data: memoryview, count: int) -> Values:
        values: Values = self.decode_all((data,), count)[0]
        return values

    def decode_all(self, data: Sequence[memoryview], count: int) -> Values:
        """See `Together`."""
        raw = exact_rows(data, count, 2)
        return torch.from_numpy(raw).view(self.dtype).float().numpy() if count else raw.astype(np.float32)


def _bytes_of(values: Values) -> NDArray[np.uint8]:
    """The bytes of each row of values."""
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint8)
