"""zstd over the bytes of equal significance together: exponents repeat, mantissas do not."""

from __future__ import annotations

import threading
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


def unshuffled(data: memoryview, width: int, size: int) -> bytes:
    """Invert `shuffled` into exactly `size` bytes. The frame must say that size before anything is allocated."""
    try:
        # zstandard ignores its own limit where a frame declares a size, so the declaration is checked first.
        frame = zstandard.get_frame_parameters(bytes(data[:18]))
        if frame.content_size != size or frame.window_size > max(WINDOW, size):
            raise CorruptPayload("compressed values declare another size")
        planes = _contexts.decompressor.decompress(bytes(data), max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptPayload(f"compressed values are damaged: {error}") from error
    if len(planes) != size:
        raise CorruptPayload("compressed values have another size")
    return np.ascontiguousarray(np.frombuffer(planes, dtype=np.uint8).reshape(width, -1).T).tobytes()


def exact_bytes(data: memoryview, count: int, width: int) -> NDArray[np.uint8]:
    """The bytes of `count` values of `width` bytes, unshuffled.

    Raises:
        CorruptPayload: the bytes do not hold exactly that many.
    """
    if count == 0 and len(data):
        raise CorruptPayload("values where none are due")
    return np.frombuffer(unshuffled(data, width, count * width) if count else b"", dtype=np.uint8)
