"""Batches of several clients that train as one: which samples each takes at a step, gathered for all of them at once.

Every client shuffles with its own generator, in the order of `fl_sim.training.loop.endless`: at the end of a step each
generator stands where it stands when the client trains alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.data import Split
from fl_sim.training.loop import Training, endless

Rows = slice | Tensor
"""Which clients: the first few (a view), or any (int64 positions)."""


class Drawn(NamedTuple):
    """Batches of equal size: the clients, their inputs (K, B, ...) and targets (K, B, ...)."""

    rows: Rows
    inputs: Tensor
    targets: Tensor


class Draws(Protocol):
    """The batches of a step, grouped by their size."""

    def next(self, count: int) -> Iterator[Drawn]:
        """The next batch of each of the first `count` clients."""


def draws(
    data: Sequence[Split], generators: Sequence[torch.Generator], samples: Sequence[int], training: Training
) -> Draws:
    """How the clients' batches are made; `samples` of each make a pass over its data."""
    first = data[0]
    shared = all(d.stored is first.stored and d.mean is first.mean and d.std is first.std for d in data)
    if shared and all(d.augment is None and d.weights is None for d in data):
        return Gathered(data, generators, samples, training.batch_size)
    return EachAlone(data, generators, samples, training)


class EachAlone:
    """Makes every client's batch as it is made when the client trains alone: for augmented inputs, or inputs of their own."""

    def __init__(
        self,
        data: Sequence[Split],
        generators: Sequence[torch.Generator],
        samples: Sequence[int],
        training: Training,
    ) -> None:
        each = zip(data, samples, generators, strict=True)
        self._batches = [endless(own, training, count, rng) for own, count, rng in each]

    def next(self, count: int) -> Iterator[Drawn]:
        """See `Draws`."""
        drawn = [next(batches) for batches in self._batches[:count]]
        for group in _alike(np.array([len(targets) for _, targets in drawn])):
            inputs, targets = (torch.stack([drawn[i][part] for i in group]) for part in (0, 1))
            yield Drawn(_rows(group, targets.device), inputs, targets)


class Gathered:
    """Takes the batches of all clients from the inputs that they share, in one selection for each size of batch.

    What a client costs at a step is so only its place in arrays of positions; once in a pass it draws a permutation.
    """

    def __init__(
        self, data: Sequence[Split], generators: Sequence[torch.Generator], samples: Sequence[int], batch_size: int
    ) -> None:
        self._first, self._generators, self._size = data[0], generators, batch_size
        lengths = [len(own) for own in data]
        self._where = torch.cat([_positions(own) for own in data])
        self._targets = torch.cat([own.labels for own in data])
        self._begin = np.cumsum([0, *lengths[:-1]])
        self._samples = np.array(samples)
        self._order = torch.empty(len(data), max(lengths), dtype=torch.int64)
        self._lengths = lengths
        self._at = self._samples.copy()  # everybody's pass is over: the next batch begins one

    def next(self, count: int) -> Iterator[Drawn]:
        """See `Draws`."""
        at, samples = self._at[:count], self._samples[:count]
        for i in np.flatnonzero(at == samples).tolist():
            length = self._lengths[i]
            torch.randperm(length, generator=self._generators[i], out=self._order[i, :length])
            at[i] = 0
        sizes = np.minimum(self._size, samples - at)
        for group in _alike(sizes):
            size = int(sizes[group[0]])
            among = self._order.numpy()[group[:, None], at[group][:, None] + np.arange(size)]
            chosen = torch.from_numpy((among + self._begin[group][:, None]).reshape(-1)).to(self._where.device)
            at[group] += size
            inputs = self._first.inputs_at(self._where.index_select(0, chosen))
            targets = self._targets.index_select(0, chosen)
            shape = (len(group), size)
            yield Drawn(
                _rows(group, targets.device),
                inputs.view(*shape, *inputs.shape[1:]),
                targets.view(*shape, *targets.shape[1:]),
            )


def _positions(data: Split) -> Tensor:
    return torch.arange(len(data), device=data.device) if data.positions is None else data.positions


def _alike(sizes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Positions of equal sizes, the size that comes first before the others."""
    _, first = np.unique(sizes, return_index=True)
    for i in np.sort(first):
        yield np.flatnonzero(sizes == sizes[i])


def _rows(group: NDArray[np.int64], device: torch.device) -> Rows:
    """The clients of a group: a slice where they are the first ones, whose memory is then used as it lies."""
    return slice(0, len(group)) if int(group[-1]) == len(group) - 1 else torch.from_numpy(group).to(device)
