"""Blobs in a file without a name, read through a memory map: as many as the disk holds, none of it this process's memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from fl_sim.runtime.state.shared_memory import Area


@dataclass(slots=True)
class _Blob:
    at: int
    size: int
    users: int


class Heap:
    """Blobs by a hash of their content, each kept once however many use it; the space of one without users is taken by the
    next of its size.

    Attributes:
        size: bytes of the file that are or were in use.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs: dict[bytes, _Blob] = {}
        self._free: dict[int, list[int]] = {}
        self.size = 0

    @cached_property
    def _area(self) -> Area:
        """The file, made when there is something to keep; it is closed with this object."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            area = Area(os.dup(file.fileno()))
        weakref.finalize(self, area.close)
        return area

    def put(self, data: bytes) -> bytes:
        """Keep a blob for one more user; returns its name.

        Raises:
            OSError: the disk is full or not writable.
        """
        name = xxhash.xxh3_128_digest(data)
        if name not in self._blobs:
            free = self._free.get(len(data))
            at = free.pop() if free else self.size
            self._area.place(data, at)
            self.size = max(self.size, at + len(data))
            self._blobs[name] = _Blob(at, len(data), 0)
        return self.share(name)

    def get(self, name: bytes) -> bytes:
        """A copy of a blob."""
        blob = self._blobs[name]
        return self._area.read((blob.at, blob.at + blob.size))

    def length(self, name: bytes) -> int:
        """Bytes of a blob."""
        return self._blobs[name].size

    def __contains__(self, name: bytes) -> bool:
        return name in self._blobs

    def share(self, name: bytes) -> bytes:
        """Keep a blob that is here for one more user; returns its name."""
        self._blobs[name].users += 1
        return name

    def drop(self, name: bytes) -> None:
        """Release one reference to a blob."""
        blob = self._blobs[name]
        blob.users -= 1
        if not blob.users:
            del self._blobs[name]
            self._free.setdefault(blob.size, []).append(blob.at)
