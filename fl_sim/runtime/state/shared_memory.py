"""Shared memory without a name, for payloads between processes of one machine."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import reduction
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fl_sim.runtime.state.buffers import Blobs

if TYPE_CHECKING:
    from numpy.typing import NDArray

Key = tuple[str, str]
Span = tuple[int, int]
"""(first byte, past the last byte)."""
ALIGNMENT = 64
"""Every blob starts at a multiple of this, so that numbers in it can be used where they lie."""


class Area:
    """Shared memory: one process writes, the others read. It grows as needed.

    It has no name in any folder, so nothing is left behind, however its processes end: the system frees it with the last
    of them. It can be given to a process that is being started, and to no other.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._file = _nameless() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None
        self._rooms: dict[int, tuple[Span, memoryview]] = {}  # by their addresses, which nothing else gets meanwhile
        self._end = 0

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (reduction.DupFd(self._file),)

    def room(self, size: int) -> memoryview:
        """Room for so many bytes; what somebody writes there need not be put in by the next `write`.

        Raises:
            OSError: the machine has not that much memory.
        """
        start, self._end = self._next(size)
        view = memoryview(self._mapped(self._end))[start : self._end]
        self._rooms[_address(np.frombuffer(view, dtype=np.uint8))] = (start, self._end), view
        return view

    def _next(self, size: int) -> Span:
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        return start, start + size

    def write(self, blobs: Iterable[Blobs]) -> list[dict[Key, Span]]:
        """Put bytes in, from the beginning or behind rooms given since the last call; returns where each one is.

        Raises:
            OSError: the machine has not that much memory.
        """
        parts, spans = list(blobs), list[dict[Key, Span]]()
        for part in parts:
            spans.append({})
            for key, blob in part.items():
                found = self._rooms.get(_address(blob)) if self._rooms else None
                if found is None or found[1].nbytes != blob.nbytes:
                    span = _, self._end = self._next(blob.nbytes)
                else:
                    span, _ = found
                spans[-1][key] = span
        view, rooms = self._mapped(self._end), {span for span, _ in self._rooms.values()}
        for part, placed in zip(parts, spans, strict=True):
            for key, span in placed.items():
                if span not in rooms:
                    view[span[0] : span[1]] = part[key].data
        self._rooms, self._end = {}, 0
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

    def copied(self, spans: Mapping[Key, Span]) -> dict[Key, bytes]:
        """Copy several out."""
        return {key: self.read(span) for key, span in spans.items()}

    def lend(self, parts: Sequence[Mapping[Key, Span]], gone: Callable[[], object]) -> list[dict[Key, memoryview]]:
        """Read-only views of what is there, without a copy; `gone` is called when nobody has any of them any more."""
        size = max((stop for part in parts for _, stop in part.values()), default=0)
        whole = np.frombuffer(self._mapped(size), dtype=np.uint8)
        whole.flags.writeable = False
        weakref.finalize(whole, gone).atexit = False
        return [{key: whole.data[start:stop] for key, (start, stop) in part.items()} for part in parts]

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
        self._file, self._map, self._rooms = -1, None, {}


def _address(blob: NDArray[np.uint8]) -> int:
    return blob.ctypes.data


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
