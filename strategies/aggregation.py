"""Aggregation of updates that may each cover other coordinates, folded one at a time into float64.

With n_k examples, mask M_k (1 where a coordinate was sent; always 1 outside the prunable names) and parameters x_k:

    coverage:   x[j] = sum_k n_k M_k[j] x_k[j] / sum_k n_k M_k[j]        unchanged where nobody sent j
    zero_fill:  x[j] = x_old[j] + sum_k n_k M_k[j] (x_k[j] - x_old[j]) / sum_k n_k

Both are FedAvg (McMahan et al., 2017) when every mask is full. They differ in how far the model moves. With error feedback
a client sends later what it leaves out now, so the server has to apply each change once, with the weight of its client
among all: `zero_fill` does, and the literature on error feedback averages so (Stich et al., 2018; Sattler et al., 2019).
`coverage` divides by the few that sent a coordinate: a change that one client of ten sends alone counts ten times. `mean`,
the default, is the one that fits. Memory is O(model) whatever the cohort. Sums of small cohorts are float64 in a fixed order of
updates, those of large ones exact (`strategies.exact_sums`): so the result is independent of engine and workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import Field, dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fl_sim.core.types import Params, Update
from strategies.reading import ReadOnce
from strategies.server_step import Aggregate, ServerState
from strategies.sums import Part, Summed, Sums

log = logging.getLogger("fl_sim")


def _folded(state: ServerState, updates: Iterable[Update]) -> Sums:
    sums = Sums.zeros(state.schema, state.scratch, exact=state.exact)
    for update in updates:
        if isinstance(update, Summed):
            sums.merge(update.sums)
        else:
            sums.add(update)
        del update  # given back before the next one is asked for
    return sums


def coverage_mean(state: ServerState, updates: Iterable[Update]) -> Params:
    """Mean over the clients that sent a coordinate; a coordinate nobody sent keeps its value."""
    sums = _folded(state, updates)
    if sums.weight == 0:
        return state.params
    old = None if sums.covered is None else state.schema.flat(state.params)

    def divide(place: slice, total: Part, covered: Part | None) -> Tensor:
        if covered is None or old is None:
            return torch.from_numpy(total).div_(sums.weight)
        by = torch.from_numpy(covered)
        return torch.where(by > 0, torch.from_numpy(total) / by, old[place].double())

    return sums.divided(divide)


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
    old = None if sums.covered is None else state.schema.flat(state.params)

    def divide(place: slice, total: Part, covered: Part | None) -> Tensor:
        mean = torch.from_numpy(total)
        if covered is not None and old is not None:
            mean += old[place].double() * (sums.weight - torch.from_numpy(covered))
        return mean.div_(sums.weight)

    return sums.divided(divide)


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


LINEAR: tuple[Aggregate, ...] = (coverage_mean, zero_fill)
"""Rules that need no more of updates than their sums."""


def weights_of_sums(aggregate: Aggregate) -> Literal["examples", "equal"] | None:
    """How a rule weighs updates where it needs no more than their sums, so that whoever has them may add them up.

    None = it looks at single updates, or nobody knows.
    """
    if type(aggregate) is EqualWeights:
        return "equal" if weights_of_sums(aggregate.aggregate) else None
    return "examples" if any(aggregate is rule for rule in LINEAR) else None


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
