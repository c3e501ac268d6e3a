"""Server methods by name: each a few lines of composition.

A preset takes keyword arguments only (from the config's `[strategy]` table) and returns a `Method`.
"""

from __future__ import annotations

from collections.abc import Mapping

from fl_sim.sparsity import OneShot, PruneTo
from fl_sim.types import UserError
from strategies.aggregation import coverage_mean, zero_fill
from strategies.base import Method
from strategies.server_step import Aggregate, Momentum, Optimise, accept

AGGREGATES: Mapping[str, Aggregate] = {"coverage": coverage_mean, "zero_fill": zero_fill}


def fedavg(*, lr: float = 1.0, momentum: float = 0.0, aggregate: str = "coverage") -> Method:
    """FedAvg (McMahan et al., 2017), with server learning rate and momentum (FedAvgM; Hsu et al., 2019).

    Args:
        lr: server learning rate; 1 takes the mean of the clients.
        momentum: server momentum.
        aggregate: "coverage" or "zero_fill", how updates that cover different coordinates are averaged.
    """
    if aggregate not in AGGREGATES:
        raise UserError(f"strategy.aggregate: unknown {aggregate!r}; allowed: {', '.join(AGGREGATES)}")
    optimise: Optimise = accept if (lr, momentum) == (1.0, 0.0) else Momentum(lr, momentum)
    return Method(aggregate=AGGREGATES[aggregate], optimise=optimise)


def global_magnitude(*, density: float = 0.1, at: int = 1, min_keep: int = 0) -> Method:
    """One-shot global magnitude pruning of the aggregated model (Global MP, arXiv 2209.14624), then masked training.

    Args:
        density: fraction of prunable weights kept.
        at: after which round the mask is made.
        min_keep: minimum threshold: weights that survive in every layer at least.
    """
    return Method(adjust_mask=PruneTo(OneShot(at, density), min_keep=min_keep))
