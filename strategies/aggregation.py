"""Aggregation of updates that may each cover other coordinates, folded one at a time into float64.

With n_k examples, mask M_k (1 where a coordinate was sent; always 1 outside the prunable names) and parameters x_k:

    coverage:   x[j] = sum_k n_k M_k[j] x_k[j] / sum_k n_k M_k[j]        unchanged where nobody sent j
    zero_fill:  x[j] = x_old[j] + sum_k n_k M_k[j] (x_k[j] - x_old[j]) / sum_k n_k

Both are FedAvg (McMahan et al., 2017) when every mask is full. Memory is O(model) whatever the cohort; float64 and a
fixed order of updates make the result independent of engine and workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fl_sim.codecs import Schema
from fl_sim.types import Params, Update
from strategies.server_step import ServerState

PENDING, PIECE = 2, 1 << 18
"""Updates that are folded together, and float64 coordinates of a piece (2 MB): the fold is bound by memory traffic."""


@dataclass
class Sums:
    """Running weighted sums over the coordinates of a schema, all float64.

    Attributes:
        total: sum of n_k M_k x_k, flat.
        covered: sum of n_k M_k over the prunable part, or None while every update was complete.
        squares: sum of n_k mean_k**2 over the BatchNorm means, for the variance between clients.
        wide: scratch; without it, each addition of float32 values allocates one of its own.
        weight: sum of n_k.
    """

    schema: Schema
    total: Tensor
    squares: Tensor
    wide: Tensor
    covered: Tensor | None = None
    weight: float = 0.0
    _pending: list[tuple[Tensor, Tensor | None, float]] = field(default_factory=list)

    @classmethod
    def zeros(cls, schema: Schema) -> Sums:
        """Empty sums."""
        means, _ = statistics(schema)
        total, squares, wide = (
            torch.zeros(size, dtype=torch.float64) for size in (schema.size, len(means), min(schema.size, PIECE))
        )
        return cls(schema, total, squares, wide)

    def add(self, update: Update) -> None:
        """Fold one update, in the order of the calls."""
        flat, alive = self.schema.flat(update.params), None
        if update.mask is not None:
            alive = self.schema.flat_mask(update.mask)
            if self.covered is None:
                self._fold_pending()
                self.covered = torch.full((self.schema.prunable_size,), self.weight, dtype=torch.float64)
        self.weight += update.num_examples
        self._pending.append((flat, alive, float(update.num_examples)))
        if len(self._pending) == PENDING:
            self._fold_pending()

    def _fold_pending(self) -> None:
        """Add what waits, piece by piece: a piece of the sums stays in the cache for all updates that wait."""
        pending, self._pending = self._pending, []
        count, means = self.schema.prunable_size, statistics(self.schema)[0]
        for start in range(0, self.schema.size if pending else 0, PIECE):
            piece = self.total[start : start + PIECE]
            for flat, alive, n in pending:
                values = flat[start : start + PIECE]
                if alive is not None and start < count:
                    sent = alive[start : start + PIECE]
                    values = torch.cat([torch.where(sent, values[: len(sent)], 0.0), values[len(sent) :]])
                wide = self.wide[: len(values)]
                np.copyto(wide.numpy(), values.numpy())  # less than half the time of Tensor.copy_
                piece.add_(wide, alpha=n)
        for flat, alive, n in pending:
            if self.covered is not None:
                self.covered.add_(n if alive is None else alive * n)
            if len(means):
                self.squares.add_(flat[means].double().square(), alpha=n)

    def done(self) -> Sums:
        """The complete sums."""
        self._fold_pending()
        return self


def _finish(sums: Sums, mean: Tensor) -> Params:
    """float64 mean -> parameters. BatchNorm variance by the law of total variance: E[var_k] + Var[mean_k]."""
    means, variances = statistics(sums.schema)
    if len(means):
        between = sums.squares / sums.weight - mean[means].square()
        mean[variances] += between.clamp_(min=0.0)
    return sums.schema.view(mean.float())


def _folded(state: ServerState, updates: Iterable[Update]) -> Sums:
    sums = Sums.zeros(state.schema)
    for update in updates:
        sums.add(update)
    return sums.done()


def coverage_mean(state: ServerState, updates: Iterable[Update]) -> Params:
    """Mean over the clients that sent a coordinate; a coordinate nobody sent keeps its value."""
    sums = _folded(state, updates)
    if sums.weight == 0:
        return state.params
    if sums.covered is None:
        return _finish(sums, sums.total / sums.weight)
    count = state.schema.prunable_size
    old = state.schema.flat(state.params)[:count].double()
    mean = torch.empty_like(sums.total)
    torch.where(sums.covered > 0, sums.total[:count] / sums.covered, old, out=mean[:count])
    torch.div(sums.total[count:], sums.weight, out=mean[count:])
    return _finish(sums, mean)


def zero_fill(state: ServerState, updates: Iterable[Update]) -> Params:
    """Mean over all clients; a coordinate that a client did not send counts as unchanged by it."""
    sums = _folded(state, updates)
    if sums.weight == 0:
        return state.params
    if sums.covered is not None:
        count = state.schema.prunable_size
        old = state.schema.flat(state.params)[:count].double()
        sums.total[:count] += old * (sums.weight - sums.covered)
    return _finish(sums, sums.total / sums.weight)


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
