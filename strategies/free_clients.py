"""Clients that can be sent a task: not on their way, reachable, and not given this version of the model yet."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fl_sim.communication.traces import Availability
from fl_sim.core.seeding import Purpose, numpy_generator

FEW = 8
"""Clients up to which each is taken out of the list alone."""
Choose = Callable[[NDArray[np.int64], int, np.random.Generator], Sequence[int]]


class FreeClients:
    """The free clients of one version of the model; draws follow from the seed and the version alone.

    Args:
        clients: all of them, int64, in ascending order.
        flying: those that are on their way.
        seed: of the run.
        number: the round whose clients are drawn.
        availability: when each is reachable; None = always.
        choose: (those that can be drawn, how many, generator) -> clients; None = uniformly.
    """

    def __init__(
        self,
        clients: NDArray[np.int64],
        flying: Collection[int],
        *,
        seed: int,
        number: int,
        availability: Availability | None,
        choose: Choose | None = None,
    ) -> None:
        self._choose, self.availability = choose, availability
        self._free: list[int] = clients[~np.isin(clients, list(flying))].tolist()  # ascending
        self._rng = numpy_generator(seed, number, Purpose.COHORT)

    def draw(self, count: int, now: float) -> list[int]:
        """Draw so many that are reachable now, or all of those; sorted. They are free no more."""
        if self._choose is not None:
            there = np.array([client for client in self._free if self._is_reachable(client, now)], dtype=np.int64)
            found = sorted(self._choose(there, min(count, len(there)), self._rng)) if len(there) else []
        elif self.availability is None:
            found = sorted(self._free[place] for place in self._places(min(count, len(self._free))))
        else:
            order = self._rng.permutation(np.array(self._free, dtype=np.int64)).tolist()
            found = sorted(islice((client for client in order if self._is_reachable(client, now)), count))
        self._take(found)
        return found

    def _places(self, count: int) -> Sequence[int]:
        """Places in the list, drawn without replacement; of one, as NumPy's `choice` draws it, in a third of the time."""
        size = len(self._free)
        if count == 1:
            return (int(self._rng.integers(size)),)
        places: list[int] = self._rng.choice(size, size=count, replace=False).tolist()
        return places

    def _is_reachable(self, client: int, now: float) -> bool:
        return self.availability is None or self.availability.until(client, now) is not None

    def _take(self, drawn: Sequence[int]) -> None:
        if len(drawn) > FEW:
            gone = set(drawn)
            self._free = [client for client in self._free if client not in gone]
        else:
            for client in drawn:
                del self._free[bisect_left(self._free, client)]

    def back(self, client: int) -> None:
        """A client that was on its way with an older version is free."""
        insort(self._free, client)

    def next_start(self, now: float) -> float:
        """When the first of them is reachable; infinity where none ever is."""
        if self.availability is None or not self._free:
            return now if self._free else math.inf
        return min(self.availability.next_start(client, now) for client in self._free)
