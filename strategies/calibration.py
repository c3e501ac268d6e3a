"""Pruning that measures first: distortion curves from clients or from the server's own images, then a mask rule.

    method = Method(calibrate=PruneByDistortion(OneShot(5, 0.1), FromClients(MeasureCurves(), images=64)))

At a pruning event the server sends the aggregated model to a cohort; each client measures on a fixed part of its data and
answers with kilobytes. The model is common, so the mean of the curves, weighted with the calibration images, is the curve
of all those images. Allocation and pruning then happen as for any other rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fl_sim.core.types import MaskRule, Params, Scores, UserError
from fl_sim.runtime.server_context import ServerContext
from fl_sim.sparsity import PruneTo, RateDistortion, Schedule
from fl_sim.sparsity.curves import Curves, MeasureCurves, calibration, pooled
from strategies.server_step import ServerState


class Ask(Protocol):
    """Questions to a cohort of clients between two rounds; both ways are booked in the phase `query`."""

    def __call__(self, state: ServerState, measure: MeasureCurves, images: int) -> list[tuple[Curves, int]]:
        """(state, how to measure, images a client) -> (distortion curves, images used) of each client that answered."""

    def gradients(self, state: ServerState, share: float) -> list[tuple[Params, int]]:
        """(state, share of the pruned weights that is told; 1 = all weights) -> (gradients, samples behind them)."""


Calibrate = Callable[[ServerContext, Ask, ServerState], MaskRule]
"""(run, clients, aggregated state whose mask is still that of the round before) -> the rule that decides its mask."""
CurveSource = Callable[[ServerContext, Ask, ServerState], Curves]


@dataclass(frozen=True)
class FromClients:
    """A cohort of clients measures, each on `images` of its own images (or all, if it has fewer)."""

    measure: MeasureCurves
    images: int

    def __call__(self, context: ServerContext, ask: Ask, state: ServerState) -> Curves:
        curves, counts = zip(*ask(state, self.measure, self.images), strict=True)
        return pooled(curves, counts, summary=self.measure.summary)


@dataclass(frozen=True)
class FromServer:
    """Measure distortion curves on the server's own images: a share of the data (`data.proxy`) or noise (`data.noise`).

    No bytes travel. Normal noise is the zero-data variant of arXiv 2308.10438.
    """

    measure: MeasureCurves
    images: int

    def __call__(self, context: ServerContext, ask: Ask, state: ServerState) -> Curves:
        if context.proxy is None:
            raise UserError(
                "strategy.curves = 'server' needs images: set data.proxy (a share) or data.noise (a number)"
            )
        model = context.model(state.params)
        return self.measure(model, calibration(context.proxy, self.images), state.schema.prunable)


SOURCES: Mapping[str, Callable[[MeasureCurves, int], CurveSource]] = {"clients": FromClients, "server": FromServer}


@dataclass(frozen=True)
class PruneByDistortion:
    """Rate-distortion pruning on a schedule; curves are measured only in rounds that prune.

    Attributes:
        schedule: round -> density.
        curves: who measures, and on what.
        min_keep: survivors of each tensor at least.
    """

    schedule: Schedule
    curves: CurveSource
    min_keep: int = 0

    def __call__(self, context: ServerContext, ask: Ask, state: ServerState) -> MaskRule:
        def allocate(scores: Scores, density: float, /, *, min_keep: int = 0) -> dict[str, int]:
            return RateDistortion(self.curves(context, ask, state))(scores, density, min_keep=min_keep)

        return PruneTo(self.schedule, allocate, min_keep=self.min_keep)
