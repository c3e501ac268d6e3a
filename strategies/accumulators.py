"""Running sums of a round: float64 numbers, as many as a model has parameters.

They take twice the memory of the model's float32. Those of a large model lie in a file without a name, through which every
update passes piece by piece: the same additions in the same order, in the memory of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.kernels import add_scaled, add_sent, add_squares
from fl_sim.core.large import is_large

PIECE = 1 << 16
"""Numbers that are in memory at a time: they stay in the cache between being read, changed and written."""


@dataclass(frozen=True)
class Accumulator:
    """`size` float64 numbers: in memory, or in a file. Whatever writes to a file raises OSError where the disk is full.

    Attributes:
        array: those in memory, 1-D; None = they are in a file.
    """

    size: int
    array: NDArray[np.float64] | None = None
    _file: FileIO | None = None

    @classmethod
    def zeros(cls, size: int, folder: Path | None = None) -> Accumulator:
        """So many zeros; where they are large and there is a folder, in a file there that goes with this object.

        Raises:
            OSError: the folder cannot be written.
        """
        if folder is None or not is_large(8 * size):
            return cls(size, np.zeros(size))
        file = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115, closed with the last reference
        file.truncate(8 * size)
        return cls(size, None, file)

    @classmethod
    def over(cls, numbers: NDArray[np.float64]) -> Accumulator:
        """These numbers, which lie in memory."""
        return cls(len(numbers), numbers)

    @property
    def in_memory(self) -> bool:
        """Whether all numbers are in memory, so that they are one piece."""
        return self.array is not None

    def pieces(self, *, keep: bool = True) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Consecutive parts with their places, to be changed in place before the next one is asked for.

        Without `keep` what was changed is lost: the last pass needs it no more.
        """
        if self.array is not None:
            yield slice(0, self.size), self.array
            return
        buffer = np.empty(min(PIECE, self.size))
        for start in range(0, self.size, PIECE):
            part = buffer[: min(PIECE, self.size - start)]
            self._move(start, part, out=False)
            yield slice(start, start + len(part)), part
            if keep:
                self._move(start, part, out=True)

    def totals(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Consecutive parts with their places; the sums are used up."""
        return self.pieces(keep=False)

    def part(self, place: slice) -> NDArray[np.float64]:
        """The numbers of a place; what is changed there is put back by `put`."""
        if self.array is not None:
            return self.array[place]
        part = np.empty(place.stop - place.start)
        self._move(place.start, part, out=False)
        return part

    def put(self, place: slice, part: NDArray[np.float64]) -> None:
        """Put back a part that was changed."""
        if self.array is None:
            self._move(place.start, part, out=True)

    def add_scaled(self, values: NDArray[np.float32], weight: float) -> None:
        """Add `weight * values` in float64."""
        for place, total in self.pieces():
            add_scaled(total, values[place], weight)

    def add_sent(
        self, covered: Accumulator, values: NDArray[np.float32], sent: NDArray[np.bool_], weight: float
    ) -> None:
        """Add `weight * values` where they were sent, and there the weight to what `covered` sums up."""
        for (place, total), (_, counts) in zip(self.pieces(), covered.pieces(), strict=True):
            add_sent(total, counts, values[place], sent[place], weight)

    def add_squares(self, values: NDArray[np.float32], positions: NDArray[np.int64], weight: float) -> None:
        """Add `weight * values[positions] ** 2` in float64."""
        for place, total in self.pieces():
            add_squares(total, values, positions[place], weight)

    def add(self, other: Accumulator | float) -> None:
        """Add the numbers of another one, as many, each once; or one number to all."""
        for place, total in self.pieces():
            total += other.part(place) if isinstance(other, Accumulator) else other

    def _move(self, start: int, part: NDArray[np.float64], *, out: bool) -> None:
        """Write a part to the file, or read it; the system may take several calls for that."""
        assert self._file is not None
        self._file.seek(8 * start)
        left = part.view(np.uint8).data
        while left:
            done = self._file.write(left) if out else self._file.readinto(left)
            if not done:
                raise OSError("a file of running sums is shorter than it was")
            left = left[done:]
