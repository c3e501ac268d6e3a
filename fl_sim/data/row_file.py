"""A float32 array in a .npy file that is written piece by piece: no more than a piece is in memory."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

ITEM = np.dtype("<f4")


class RowFile:
    """Rows of so many columns, written in any order; `finish` says how many there are."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width
        self._start = len(self._header(0))
        self._end = self._start
        path.write_bytes(self._header(0))

    def put(self, row: int, columns: Sequence[int], block: NDArray[np.float32]) -> None:
        """Write some columns of the rows from `row` on: block is (rows, columns). Raises OSError where the disk is full."""
        start = self._start + row * self.width * ITEM.itemsize
        self._reserve(start + len(block) * self.width * ITEM.itemsize)
        # A window for this piece alone: what is not mapped is not in this process's memory.
        window = np.memmap(self.path, ITEM, "r+", offset=start, shape=(len(block), self.width))
        for number, column in enumerate(columns):
            window[:, column] = block[:, number]

    def finish(self, rows: int) -> None:
        """Cut the file to so many rows."""
        with self.path.open("r+b") as stream:
            stream.truncate(self._start + rows * self.width * ITEM.itemsize)
            stream.write(self._header(rows))

    def _reserve(self, end: int) -> None:
        """Let the file have so many bytes on the disk: writing to a mapped file that has no room ends the process."""
        if end <= self._end:
            return
        with self.path.open("r+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), self._end, end - self._end)
            else:
                stream.truncate(end)
        self._end = end

    def _header(self, rows: int) -> bytes:
        """NumPy leaves room in it for any number of rows, so that its length does not depend on them."""
        stream = io.BytesIO()
        shape = (rows, self.width)
        npy.write_array_header_1_0(stream, {"descr": ITEM.str, "fortran_order": False, "shape": shape})
        return stream.getvalue()
