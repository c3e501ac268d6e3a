"""Positions of every client's samples, as one array: a million clients need no million arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


class Parts(Sequence[Positions]):
    """A sequence of index arrays (int64), one a client; each is a view that is made when it is asked for.

    Attributes:
        positions: those of the first client, then those of the second, ...
        starts: where each client's begin, and at last where they end; int64 (clients + 1,).
    """

    def __init__(self, positions: Positions, starts: NDArray[np.int64]) -> None:
        self.positions, self.starts = positions, starts

    @classmethod
    def owned(cls, owner: NDArray[np.int64], clients: int) -> Parts:
        """The parts, sorted, of samples whose clients are known: `owner` is int64 (samples,)."""
        starts = np.zeros(clients + 1, dtype=np.int64)
        np.cumsum(np.bincount(owner, minlength=clients), out=starts[1:])
        return cls(np.argsort(owner, kind="stable"), starts)

    @classmethod
    def of(cls, arrays: Sequence[Positions]) -> Parts:
        """The same positions as these arrays."""
        starts = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=starts[1:])
        return cls(np.concatenate([np.zeros(0, dtype=np.int64), *arrays]), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, client: int) -> Positions: ...
    @overload
    def __getitem__(self, client: slice) -> Parts: ...
    def __getitem__(self, client: int | slice) -> Positions | Parts:
        number = range(len(self))[client]
        if isinstance(number, range):
            return self._some(number)
        return self.positions[self.starts[number] : self.starts[number + 1]]

    def __iter__(self) -> Iterator[Positions]:
        return (self.positions[low:high] for low, high in itertools.pairwise(self.starts.tolist()))

    def _some(self, clients: range) -> Parts:
        if clients.step != 1:
            return Parts.of([self[number] for number in clients])
        starts = self.starts[clients.start : max(clients.start, clients.stop) + 1]
        return Parts(self.positions[starts[0] : starts[-1]], starts - starts[0])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Samples of each client, int64 (clients,)."""
        return np.diff(self.starts)

    @property
    def owner(self) -> NDArray[np.int64]:
        """The client of each of `positions`."""
        return np.repeat(np.arange(len(self)), self.sizes)
