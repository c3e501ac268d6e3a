"""Aggregation of updates that may each cover other coordinates, folded one at a time into float64.

With n_k examples, mask M_k (1 where a coordinate was sent; always 1 outside the prunable names) and parameters x_k:

    coverage:   x[j] = sum_k n_k M_k[j] x_k[j] / sum_k n_k M_k[j]        unchanged where nobody sent j
    zero_fill:  x[j] = x_old[j] + sum_k n_k M_k[j] (x_k[j] - x_old[j]) / sum_k n_k

Both are FedAvg (McMahan et al., 2017) when every mask is full. They differ in how far the model moves. With error feedback
a client sends later what it leaves out now, so the server has to apply each change once, with the weight of its client
among all: `zero_fill` does, and the literature on error feedback averages so (Stich et al., 2018; Sattler et al., 2019).
`coverage` divides by the few that sent a coordinate: a change that one client of ten sends alone counts ten times. `mean`,
the default, is the one that fits. Memory is O(model) whatever the cohort; float64 and a
fixed order of updates make the result independent of engine and workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import Field, dataclass, replace
from functools import lru_cache
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fl_sim.codecs import Schema
from fl_sim.core.kernels import add_scaled, add_sent, add_squares
from fl_sim.core.types import Params, Update
from strategies.reading import ReadOnce
from strategies.server_step import Aggregate, ServerState

log = logging.getLogger("fl_sim")


@dataclass
class Sums:
    """Running weighted sums over the coordinates of a schema, all float64.

    Attributes:
        means: int64 positions of the BatchNorm means.
        total: sum of n_k M_k x_k, flat.
        covered: sum of n_k M_k over the prunable part, or None while every update was complete.
        squares: sum of n_k mean_k**2 over the BatchNorm means, for the variance between clients.
        weight: sum of n_k.
    """

    schema: Schema
    means: Tensor
    total: Tensor
    squares: Tensor
    covered: Tensor | None = None
    weight: float = 0.0

    @classmethod
    def zeros(cls, schema: Schema) -> Sums:
        """Empty sums."""
        means, _ = statistics(schema)
        total, squares = (torch.zeros(size, dtype=torch.float64) for size in (schema.size, len(means)))
        return cls(schema, means, total, squares)

    def add(self, update: Update, weight: float | None = None) -> None:
        """Fold one update, in the order of the calls; None = its number of examples is its weight."""
        values, total = self.schema.flat(update.params).numpy(), self.total.numpy()
        weight, count = float(update.num_examples) if weight is None else weight, self.schema.prunable_size
        if update.mask is None:
            add_scaled(total, values, weight)
            if self.covered is not None:
                self.covered += weight
        else:
            if self.covered is None:
                self.covered = torch.full((count,), self.weight, dtype=torch.float64)
            sent = self.schema.flat_mask(update.mask).numpy()
            add_sent(total[:count], self.covered.numpy(), values[:count], sent, weight)
            add_scaled(total[count:], values[count:], weight)
        add_squares(self.squares.numpy(), values, self.means.numpy(), weight)
        self.weight += weight


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
        del update  # given back before the next one is asked for
    return sums


def coverage_mean(state: ServerState, updates: Iterable[Update]) -> Params:
    """Mean over the clients that sent a coordinate; a coordinate nobody sent keeps its value."""
    sums = _folded(state, updates)
    if sums.weight == 0:
        return state.params
    if sums.covered is None:
        return _finish(sums, sums.total.div_(sums.weight))
    count = state.schema.prunable_size
    old = state.schema.flat(state.params)[:count].double()
    mean = torch.empty_like(sums.total)
    torch.where(sums.covered > 0, sums.total[:count] / sums.covered, old, out=mean[:count])
    torch.div(sums.total[count:], sums.weight, out=mean[count:])
    return _finish(sums, mean)


def mean(state: ServerState, updates: Iterable[Update]) -> Params:
    """The default: `coverage_mean`, whose place `zero_fill` takes in runs with `wire.error_feedback` (see `settled`)."""
    return coverage_mean(state, updates)


def zero_fill(state: ServerState, updates: Iterable[Update]) -> Params:
    """Mean over all clients; a coordinate that a client did not send counts as unchanged by it."""
    return zero_filled(state, _folded(state, updates))


def zero_filled(state: ServerState, sums: Sums) -> Params:
    """The mean of what was folded; a coordinate that a client did not send counts as unchanged by it."""
    if sums.weight == 0:
        return state.params
    if sums.covered is not None:
        count = state.schema.prunable_size
        old = state.schema.flat(state.params)[:count].double()
        sums.total[:count] += old * (sums.weight - sums.covered)
    return _finish(sums, sums.total.div_(sums.weight))


@dataclass(frozen=True)
class EqualWeights:
    """Every client counts the same, however many examples it has; then another rule."""

    aggregate: Aggregate = mean

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        return self.aggregate(state, ReadOnce(replace(update, num_examples=1) for update in updates))


EQUAL = EqualWeights()
CONSERVING: tuple[Aggregate, ...] = (zero_fill,)
"""Rules that apply each change once, whichever clients send it: sum of n_k changes sent = sum of n_k x change of the model."""


@runtime_checkable
class Around(Protocol):
    """A rule around another, for instance `strategies.robust.ClipNorm`; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def aggregate(self) -> Aggregate:
        """The other."""


def settled(aggregate: Aggregate, *, error_feedback: bool) -> Aggregate:
    """The aggregation rule of a run: in the place of `mean`, the one that fits.

    A rule that was chosen stays. Where it is not known to go with error feedback, the log says so in one line.
    """
    chosen = _fitting(aggregate, zero_fill if error_feedback else coverage_mean)
    inner = chosen.aggregate if isinstance(chosen, EqualWeights) else chosen
    if error_feedback and not any(inner is rule for rule in CONSERVING):
        name = getattr(chosen, "__name__", type(chosen).__name__)
        log.warning(
            "wire.error_feedback with the aggregation rule %s: clients send later what they left out, and this rule is not "
            "known to apply each change once; strategy.aggregate = 'mean' (the default) or 'zero_fill' does",
            name,
        )
    return chosen


def _fitting(aggregate: Aggregate, fitting: Aggregate) -> Aggregate:
    if aggregate is mean:
        return fitting
    return (
        replace(aggregate, aggregate=_fitting(aggregate.aggregate, fitting))
        if isinstance(aggregate, Around)
        else aggregate
    )


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
