"""Codec benchmark: payload sizes beside their entropy floor and common codecs, and speeds."""

from __future__ import annotations

import io
import math
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from fl_sim.bench.contest import quickest
from fl_sim.codecs import Schema, decode, encode
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import FlatMask, FlatParams
from fl_sim.runtime.grids.allocator import keep_freed_memory

DENSITIES = (0.01, 0.05, 0.1, 0.3, 0.5)


def shapes(blocks: int, base: int) -> dict[str, torch.Size]:
    """Convolutions of a CIFAR ResNet of 6 * blocks + 2 layers with `base` channels in its first stage."""
    made, before = {"first": torch.Size((base, 3, 3, 3))}, base
    for stage in range(3):
        width = base << stage
        for i in range(2 * blocks):
            made[f"{stage}.{i}"] = torch.Size((width, before, 3, 3))
            before = width
    return made | {"head": torch.Size((10, before))}


Shapes = Mapping[str, torch.Size]
MODELS: Mapping[str, Shapes] = {"0.46M": shapes(5, 16), "11M": shapes(6, 70)}


@dataclass(frozen=True)
class Sample:
    """A sparse update: flat values, flat mask, its floor in bytes (4 a value plus log2 C(n, k) a tensor), and what it changes."""

    schema: Schema
    values: NDArray[np.float32]
    mask: NDArray[np.bool_]
    floor: float
    old: NDArray[np.float32]

    def params(self, flat: NDArray[np.float32]) -> FlatParams:
        """Flat values as the tensors of the schema."""
        return FlatParams.view(torch.from_numpy(flat), self.schema.names, self.schema.shapes)


@dataclass(frozen=True)
class Row:
    """Size and speed of one codec on one sample; MB/s count the dense model, 4 bytes a coordinate."""

    model: str
    density: float
    codec: str
    bytes_over_floor: float
    encode_mbps: float
    decode_mbps: float
    peak_mb: float


def sample(layers: Shapes, density: float) -> Sample:
    """Independent coordinates whose density differs from layer to layer; values are differences of float32 weights."""
    rng, parts, floor = numpy_generator(0, Purpose.DATA), [], 0.0
    for shape in layers.values():
        odds = density / (1 - density) * math.exp(0.8 * rng.standard_normal()) if density < 1 else math.inf
        part = rng.random(shape.numel()) < (odds / (1 + odds) if density < 1 else 1)
        n, k = len(part), int(part.sum())
        floor += (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8
        parts.append(part)
    mask = np.concatenate(parts)
    old = rng.normal(0, 0.05, len(mask)).astype(np.float32)
    new = old + rng.normal(0, 0.002, len(mask)).astype(np.float32)
    zeros = {name: torch.empty(shape) for name, shape in layers.items()}
    return Sample(Schema.of(zeros, zeros), new - old, mask, floor + 4 * int(mask.sum()), old)


Coder = tuple[Callable[[Sample], bytes], Callable[[bytes, Sample], object]]


def _ours(values: str, *, contexts: bool = False) -> Coder:
    def write(s: Sample) -> bytes:
        mask = FlatMask.view(torch.from_numpy(s.mask), s.schema.names, s.schema.shapes)
        return encode(s.params(s.values), mask, schema=s.schema, values=values, contexts=contexts)

    return write, lambda data, s: decode(data, schema=s.schema)


def _whole(values: str) -> Coder:
    def write(s: Sample) -> bytes:
        return encode(s.params(s.values), None, schema=s.schema, values=values)

    return write, lambda data, s: decode(data, schema=s.schema)


def _exact_change(s: Sample) -> bytes:
    new = s.params(s.old + s.values)
    return encode(new, None, schema=s.schema, values="float32-delta", base=s.params(s.old))


def _coo_write(s: Sample) -> bytes:
    where = np.flatnonzero(s.mask).astype(np.int32)
    return where.tobytes() + s.values[where].tobytes()


def _coo_read(data: bytes, s: Sample) -> object:
    where, values = np.frombuffer(data, np.int32)[: len(data) // 8], np.frombuffer(data, np.float32)[len(data) // 8 :]
    flat = np.zeros(len(s.mask), np.float32)
    flat[where] = values
    return flat


def _bitmap_write(s: Sample) -> bytes:
    return np.packbits(s.mask).tobytes() + s.values[s.mask].tobytes()


def _bitmap_read(data: bytes, s: Sample) -> object:
    head = -(-len(s.mask) // 8)
    mask = np.unpackbits(np.frombuffer(data[:head], np.uint8), count=len(s.mask)).view(np.bool_)
    flat = np.zeros(len(s.mask), np.float32)
    flat[mask] = np.frombuffer(data[head:], np.float32)
    return flat


def _zstd_write(s: Sample) -> bytes:
    head = zstandard.compress(np.packbits(s.mask).tobytes(), 3)
    return len(head).to_bytes(8, "little") + head + s.values[s.mask].tobytes()


def _zstd_read(data: bytes, s: Sample) -> object:
    size = int.from_bytes(data[:8], "little")
    return _bitmap_read(zstandard.decompress(data[8 : 8 + size]) + data[8 + size :], s)


def _npz_write(s: Sample) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.where(s.mask, s.values, np.float32(0)))
    return stream.getvalue()


CODECS: Mapping[str, Coder] = {
    "fl_sim float32": _ours("float32"),
    "fl_sim float32-zstd": _ours("float32-zstd"),
    "fl_sim masks smallest": _ours("float32", contexts=True),
    "COO int32": (_coo_write, _coo_read),
    "bitmap": (_bitmap_write, _bitmap_read),
    "bitmap + zstd-3": (_zstd_write, _zstd_read),
    "np.savez_compressed": (_npz_write, lambda data, s: np.load(io.BytesIO(data), allow_pickle=False)["x"]),
}

WHOLE: Mapping[str, Coder] = {
    "fl_sim float32-delta": (_exact_change, lambda data, s: decode(data, schema=s.schema, base=s.params(s.old))),
    **{f"fl_sim {name}": _whole(name) for name in ("float32-zstd", "int8", "int4", "int2", "sign")},
}
"""What codes a whole model, at density 1."""


def measure(
    *, models: Mapping[str, Shapes] = MODELS, densities: Sequence[float] = DENSITIES, repeats: int = 5
) -> list[Row]:
    """Every codec on every model and density, then on the whole model, on one thread; the best of `repeats`."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the engines do; it serves every codec here alike
    rows = []
    for model, layers in models.items():
        for density in (*densities, 1.0):
            s = sample(layers, density)
            for name, (write, read) in (CODECS if density < 1 else WHOLE).items():
                times = 1 if name == "np.savez_compressed" else repeats
                data = write(s)
                megabytes = 4 * len(s.mask) / 1e6
                encoding, decoding = quickest(lambda: write(s), times), quickest(lambda: read(data, s), times)  # noqa: B023
                tracemalloc.start()
                read(write(s), s)
                peak = tracemalloc.get_traced_memory()[1] / 1e6
                tracemalloc.stop()
                rows.append(
                    Row(model, density, name, len(data) / s.floor, megabytes / encoding, megabytes / decoding, peak)
                )
    return rows
