"""Weighted sums of a round's updates, folded one at a time into float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.codecs import Schema
from fl_sim.core.kernels import add_scaled, add_sent, add_squares
from fl_sim.core.types import FlatParams, Update
from strategies.accumulators import Accumulator

Part = NDArray[np.float64]
Divide = Callable[[slice, Part, Part | None], Tensor]
"""(place in the schema's order, sums there, weights that cover it) -> their mean, float64; None = the weight of all."""


@dataclass
class Sums:
    """Running weighted sums over the coordinates of a schema, all float64.

    Attributes:
        means: int64 positions of the BatchNorm means.
        prunable: sum of n_k M_k x_k over the prunable part, which comes first.
        others: sum of n_k x_k over the rest.
        covered: sum of n_k M_k over the prunable part, or None while every update was complete.
        squares: sum of n_k mean_k**2 over the BatchNorm means, for the variance between clients.
        weight: sum of n_k.
        folder: where sums of a large model lie; None = in memory.
    """

    schema: Schema
    means: Tensor
    prunable: Accumulator
    others: Accumulator
    squares: Tensor
    covered: Accumulator | None = None
    weight: float = 0.0
    folder: Path | None = None

    @classmethod
    def zeros(cls, schema: Schema, folder: Path | None = None) -> Sums:
        """Empty sums."""
        (means, _), count = statistics(schema), schema.prunable_size
        prunable, others = (Accumulator.zeros(size, folder) for size in (count, schema.size - count))
        return cls(schema, means, prunable, others, torch.zeros(len(means), dtype=torch.float64), folder=folder)

    def add(self, update: Update, weight: float | None = None) -> None:
        """Fold one update, in the order of the calls; None = its number of examples is its weight.

        Raises:
            OSError: the disk is full, where sums lie in a file.
        """
        values, count = self.schema.flat(update.params).numpy(), self.schema.prunable_size
        weight = float(update.num_examples) if weight is None else weight
        if update.mask is None:
            for place, total in self.prunable.pieces():
                add_scaled(total, values[place], weight)
            if self.covered is not None:
                for _, covered in self.covered.pieces():
                    covered += weight
        else:
            self._add_sent(values, self.schema.flat_mask(update.mask).numpy(), weight)
        for place, total in self.others.pieces():
            add_scaled(total, values[count:][place], weight)
        if self.means.numel():
            add_squares(self.squares.numpy(), values, self.means.numpy(), weight)
        self.weight += weight

    def _add_sent(self, values: NDArray[np.float32], sent: NDArray[np.bool_], weight: float) -> None:
        """Fold the prunable part of an update that was sent under a mask."""
        covering = self._covering().pieces()
        for (place, total), (_, covered) in zip(self.prunable.pieces(), covering, strict=True):
            add_sent(total, covered, values[place], sent[place], weight)

    def _covering(self) -> Accumulator:
        """The weights that cover each prunable coordinate; until now every update was complete, where there were none."""
        if self.covered is None:
            self.covered = Accumulator.zeros(self.schema.prunable_size, self.folder)
            for _, covered in self.covered.pieces():
                covered += self.weight
        return self.covered

    def merge(self, other: Sums) -> None:
        """Add other sums of the same schema.

        Raises:
            OSError: the disk is full, where sums lie in a file.
        """
        self.prunable.add(other.prunable)
        self.others.add(other.others)
        if self.covered is not None or other.covered is not None:
            covering = self._covering()
            if other.covered is not None:
                covering.add(other.covered)
            else:
                for _, covered in covering.pieces():
                    covered += other.weight
        self.squares += other.squares
        self.weight += other.weight

    def divided(self, divide: Divide, *, between: bool = True) -> FlatParams:
        """The mean that `divide` makes of the sums, in float32; it is given part after part, once, and may change them.

        BatchNorm variance is that of all clients' samples, by the law of total variance: E[var_k] + Var[mean_k]; without
        `between` it is the first term alone.
        """
        schema, count = self.schema, self.schema.prunable_size
        mean, exact = torch.empty(schema.size), _Picked(schema)
        covering = None if self.covered is None else self.covered.pieces(keep=False)
        for place, total in self.prunable.pieces(keep=False):
            covered = None if covering is None else next(covering)[1]
            _put(mean, place, divide(place, total, covered), exact)
        for place, total in self.others.pieces(keep=False):
            there = slice(count + place.start, count + place.stop)
            _put(mean, there, divide(there, total, None), exact)
        if between and len(self.means):
            among = self.squares / self.weight - exact.means.square()
            mean[exact.at_variances] = exact.variances.add_(among.clamp_(min=0.0)).float()
        return schema.view(mean)


class _Picked:
    """The float64 means at the places of the BatchNorm statistics, of which the variance between clients is a difference."""

    def __init__(self, schema: Schema) -> None:
        self.at_means, self.at_variances = statistics(schema)
        self.means, self.variances = (torch.empty(len(self.at_means), dtype=torch.float64) for _ in range(2))

    def take(self, place: slice, mean: Tensor) -> None:
        for wanted, found in ((self.at_means, self.means), (self.at_variances, self.variances)):
            inside = (wanted >= place.start) & (wanted < place.stop)
            found[inside] = mean[wanted[inside] - place.start]


def _put(into: Tensor, place: slice, mean: Tensor, exact: _Picked) -> None:
    into[place] = mean  # rounds to float32
    if len(exact.at_means):
        exact.take(place, mean)


@lru_cache(maxsize=8)
def statistics(schema: Schema) -> tuple[Tensor, Tensor]:
    """Flat positions of BatchNorm running means and of the matching running variances, int64, equally long."""
    starts, at = {}, 0
    for name, shape in zip(schema.names, schema.shapes, strict=True):
        starts[name] = (at, shape.numel())
        at += shape.numel()
    means: list[int] = []
    variances: list[int] = []
    for name in schema.buffers:
        if name.endswith("running_mean"):
            start, size = starts[name]
            partner, _ = starts[name.removesuffix("running_mean") + "running_var"]
            means.extend(range(start, start + size))
            variances.extend(range(partner, partner + size))
    return torch.tensor(means, dtype=torch.int64), torch.tensor(variances, dtype=torch.int64)
