"""Shared memory without a name, for payloads between processes of one machine."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from multiprocessing import reduction
from typing import Protocol

from fl_sim.runtime.state.buffers import Blobs

Key = tuple[str, str]
Span = tuple[int, int]
"""(first byte, past the last byte)."""


class Area:
    """Shared memory: one process writes, the others copy out. It grows as needed.

    It has no name in any folder, so nothing is left behind, however its processes end: the system frees it with the last
    of them. It can be given to a process that is being started, and to no other.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._file = _nameless() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (reduction.DupFd(self._file),)

    def write(self, blobs: Iterable[Blobs]) -> list[dict[Key, Span]]:
        """Put bytes in, from the beginning; returns where each one is.

        Raises:
            OSError: the machine has not that much memory.
        """
        parts = list(blobs)
        view = self._mapped(sum(blob.nbytes for part in parts for blob in part.values()))
        spans: list[dict[Key, Span]] = []
        at = 0
        for part in parts:
            placed: dict[Key, Span] = {}
            for key, blob in part.items():
                placed[key] = start, at = at, at + blob.nbytes
                view[start:at] = blob.data
            spans.append(placed)
        return spans

    def place(self, data: bytes, at: int) -> None:
        """Put bytes in, from the byte `at` on.

        Raises:
            OSError: the machine, or the disk of an area that is a file, has not that much room.
        """
        self._mapped(at + len(data))[at : at + len(data)] = data

    def read(self, span: Span) -> bytes:
        """Copy bytes out."""
        start, stop = span
        return self._mapped(stop)[start:stop]

    def _mapped(self, size: int) -> mmap.mmap:
        """The memory, at least `size` bytes of it."""
        if self._map is None or len(self._map) < size:
            if os.fstat(self._file).st_size < max(1, size):
                _reserve(self._file, max(mmap.PAGESIZE, size + size // 4))
            self._map = mmap.mmap(self._file, os.fstat(self._file).st_size)
        return self._map

    def close(self) -> None:
        """Give the memory back, as far as this process goes; harmless when called twice."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._map = -1, None


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fl_sim")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _reserve(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)  # a page that the machine cannot give would end the process when written
    else:
        os.ftruncate(file, size)


class _Passed(Protocol):
    """A descriptor on its way to a process that starts (`multiprocessing.reduction.DupFd`)."""

    def detach(self) -> int: ...


def _received(descriptor: _Passed) -> Area:
    return Area(descriptor.detach())
