"""Weighted sums of a round's updates, folded one at a time into float64.

Those of a large cohort are exact (`strategies.exact_sums`): whoever adds up which of its updates, the bits are the same.
"""

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
from fl_sim.core.types import FlatParams, Update
from strategies.accumulators import Accumulator
from strategies.exact_sums import ExactSum

Part = NDArray[np.float64]
Divide = Callable[[slice, Part, Part | None], Tensor]
"""(place in the schema's order, sums there, weights that cover it) -> their mean, float64; None = the weight of all."""


Total = Accumulator | ExactSum


@dataclass
class Sums:
    """Running weighted sums over the coordinates of a schema, all float64.

    Attributes:
        means: int64 positions of the BatchNorm means.
        prunable: sum of n_k M_k x_k over the prunable part, which comes first.
        others: sum of n_k x_k over the rest.
        squares: sum of n_k mean_k**2 over the BatchNorm means, for the variance between clients.
        covered: sum of n_k M_k over the prunable part, or None while every update was complete.
        weight: sum of n_k. Counts below 2^53 in all are exact, as `covered` is.
        folder: where sums of a large model lie; None = in memory.
    """

    schema: Schema
    means: Tensor
    prunable: Total
    others: Total
    squares: Total
    covered: Accumulator | None = None
    weight: float = 0.0
    folder: Path | None = None

    @classmethod
    def zeros(cls, schema: Schema, folder: Path | None = None, *, exact: bool = False) -> Sums:
        """Empty sums; exact ones can be merged."""
        (means, _), count, kind = statistics(schema), schema.prunable_size, ExactSum if exact else Accumulator
        prunable, others = (kind.zeros(size, folder) for size in (count, schema.size - count))
        return cls(schema, means, prunable, others, kind.zeros(len(means)), folder=folder)

    def add(self, update: Update, weight: float | None = None) -> None:
        """Fold one update; None = its number of examples is its weight.

        Raises:
            OSError: the disk is full, where sums lie in a file.
        """
        values, count = self.schema.flat(update.params).numpy(), self.schema.prunable_size
        weight = float(update.num_examples) if weight is None else weight
        if update.mask is None:
            self.prunable.add_scaled(values[:count], weight)
            if self.covered is not None:
                self.covered.add(weight)
        else:
            sent = self.schema.flat_mask(update.mask).numpy()
            self.prunable.add_sent(self._covering(), values[:count], sent, weight)
        self.others.add_scaled(values[count:], weight)
        if self.means.numel():
            self.squares.add_squares(values, self.means.numpy(), weight)
        self.weight += weight

    def _covering(self) -> Accumulator:
        """The weights that cover each prunable coordinate; until now every update was complete, where there were none."""
        if self.covered is None:
            self.covered = Accumulator.zeros(self.schema.prunable_size, self.folder)
            self.covered.add(self.weight)
        return self.covered

    def merge(self, other: Sums) -> None:
        """Add other sums of the same schema; both are exact.

        Raises:
            OSError: the disk is full, where sums lie in a file.
        """
        if self.covered is not None or other.covered is not None:
            self._covering().add(other.weight if other.covered is None else other.covered)
        for mine, theirs in zip(self.totals, other.totals, strict=True):
            assert isinstance(mine, ExactSum)
            assert isinstance(theirs, ExactSum)
            mine.merge(theirs)
        self.weight += other.weight

    @property
    def totals(self) -> tuple[Total, Total, Total]:
        """Of the prunable part, of the rest, and of the squares."""
        return self.prunable, self.others, self.squares

    def divided(self, divide: Divide, *, between: bool = True) -> FlatParams:
        """The mean that `divide` makes of the sums, in float32; it is given part after part, once, and may change them.

        BatchNorm variance is that of all clients' samples, by the law of total variance: E[var_k] + Var[mean_k]; without
        `between` it is the first term alone.
        """
        schema, count = self.schema, self.schema.prunable_size
        mean, exact = torch.empty(schema.size), _Picked(schema)
        covering = None if self.covered is None else self.covered.totals()
        for place, total in self.prunable.totals():
            covered = None if covering is None else next(covering)[1]
            _put(mean, place, divide(place, total, covered), exact)
        for place, total in self.others.totals():
            there = slice(count + place.start, count + place.stop)
            _put(mean, there, divide(there, total, None), exact)
        if between and len(self.means):
            ((_, squares),) = self.squares.totals()
            among = torch.from_numpy(squares) / self.weight - exact.means.square()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed(Update):
    """Stands for updates that were added up elsewhere; it has no parameters.

    Attributes:
        sums: of these updates.
        clients: whose they are.
    """

    sums: Sums
    clients: int
