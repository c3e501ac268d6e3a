"""zstd over the bytes of equal significance together: exponents repeat, mantissas do not."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import zstandard
from numpy.typing import NDArray

from fl_sim.codecs.errors import CorruptPayload

WINDOW = 1 << 27


class _Contexts(threading.local):
    """zstd's working memory, one of each thread: to make it takes longer than to compress the biases of a small model."""

    @cached_property
    def compressor(self) -> zstandard.ZstdCompressor:
        return zstandard.ZstdCompressor(level=1, write_content_size=True)

    @cached_property
    def decompressor(self) -> zstandard.ZstdDecompressor:
        return zstandard.ZstdDecompressor(max_window_size=WINDOW)


_contexts = _Contexts()


def raw(values: NDArray[np.generic]) -> memoryview:
    """An array's bytes, without copying where it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def shuffled(raw: memoryview, width: int) -> bytes:
    """zstd over the bytes of equal significance together: exponents repeat, mantissas do not."""
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(-1, width).T
    return _contexts.compressor.compress(memoryview(planes.tobytes()))


def shuffled_all(rows: NDArray[np.uint8], width: int) -> list[bytes]:
    """`shuffled` of each row of (rows, bytes)."""
    planes = np.ascontiguousarray(rows.reshape(len(rows), -1, width).transpose(0, 2, 1)).reshape(rows.shape)
    compress = _contexts.compressor.compress
    return [compress(row.data) for row in planes]


def unshuffled_all(data: Sequence[memoryview], width: int, size: int) -> NDArray[np.uint8]:
    """Invert `shuffled_all` into (rows, size) bytes; raises as `unshuffled` does."""
    planes = np.frombuffer(b"".join([_planes(each, size) for each in data]), dtype=np.uint8)
    return np.ascontiguousarray(planes.reshape(len(data), width, -1).transpose(0, 2, 1)).reshape(len(data), size)


def unshuffled(data: memoryview, width: int, size: int) -> bytes:
    """Invert `shuffled` into exactly `size` bytes.

    Raises:
        CorruptPayload: it is no frame of so many bytes.
    """
    return np.ascontiguousarray(np.frombuffer(_planes(data, size), dtype=np.uint8).reshape(width, -1).T).tobytes()


def _planes(data: memoryview, size: int) -> bytes:
    """Exactly `size` bytes, as they were compressed. The frame must say that size before anything is allocated."""
    try:
        # zstandard ignores its own limit where a frame declares a size, so the declaration is checked first.
        frame = zstandard.get_frame_parameters(bytes(data[:18]))
        if frame.content_size != size or frame.window_size > max(WINDOW, size):
            raise CorruptPayload("compressed values declare another size")
        planes: bytes = _contexts.decompressor.decompress(bytes(data), max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptPayload(f"compressed values are damaged: {error}") from error
    if len(planes) != size:
        raise CorruptPayload("compressed values have another size")
    return planes


def exact_bytes(data: memoryview, count: int, width: int) -> NDArray[np.uint8]:
    """The bytes of `count` values of `width` bytes, unshuffled.

    Raises:
        CorruptPayload: the bytes do not hold exactly that many.
    """
    row: NDArray[np.uint8] = exact_rows((data,), count, width)[0]
    return row


def exact_rows(data: Sequence[memoryview], count: int, width: int) -> NDArray[np.uint8]:
    """`exact_bytes` of each, as rows."""
    if count:
        return unshuffled_all(data, width, count * width)
    if any(map(len, data)):
        raise CorruptPayload("values where none are due")
    return np.empty((len(data), 0), dtype=np.uint8)
