"""Clients that can be sent a task: not on their way, reachable, and not given this version of the model yet."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np

from fl_sim.communication.traces import Availability
from fl_sim.core.seeding import Purpose, numpy_generator


class FreeClients:
    """The free clients of one version of the model; draws follow from the seed and the version alone.

    Args:
        clients: all of them, in ascending order.
        flying: those that are on their way.
        seed: of the run.
        number: the round whose clients are drawn.
        availability: when each is reachable; None = always.
    """

    def __init__(
        self,
        clients: Iterable[int],
        flying: Collection[int],
        *,
        seed: int,
        number: int,
        availability: Availability | None,
    ) -> None:
        self.clients, self.availability = np.array(list(clients), dtype=np.int64), availability
        self.free = ~np.isin(self.clients, list(flying))
        self._rng = numpy_generator(seed, number, Purpose.COHORT)

    def draw(self, count: int, now: float) -> list[int]:
        """Draw so many that are reachable now, or all of those; sorted. They are free no more."""
        places = np.flatnonzero(self.free)
        if self.availability is None:
            drawn = self._rng.choice(places, size=min(count, len(places)), replace=False)
        else:
            found: list[int] = []
            for place in self._rng.permutation(places).tolist():
                if len(found) == count:
                    break
                if self.availability.until(int(self.clients[place]), now) is not None:
                    found.append(place)
            drawn = np.array(found, dtype=np.int64)
        self.free[drawn] = False
        return sorted(self.clients[drawn].tolist())

    def back(self, client: int) -> None:
        """A client that was on its way with an older version is free."""
        self.free[np.searchsorted(self.clients, client)] = True

    def next_start(self, now: float) -> float:
        """When the first of them is reachable; infinity where none ever is."""
        left: list[int] = self.clients[self.free].tolist()
        if self.availability is None or not left:
            return now if left else math.inf
        return min(self.availability.next_start(client, now) for client in left)
