"""The slots of a server algorithm: the functions that `Method` composes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fl_sim.core.types import MaskRule, Scalar
from strategies.aggregation import mean
from strategies.calibration import Calibrate
from strategies.distillation import Teach, Unite, apart, untaught
from strategies.downlink_types import Downlink, as_configured
from strategies.server_step import Aggregate, Optimise, accept

Account = Callable[[int], Mapping[str, float]]
"""Rounds finished -> numbers of the algorithm's own for the round's log, for instance the privacy spent."""


def nothing(rounds: int) -> Mapping[str, float]:
    """Add no numbers of its own."""
    return {}


@dataclass(frozen=True)
class Slots:
    """Functions that process a round's updates; each has a default.

    Attributes:
        aggregate: (state, updates) -> parameters; the default is a weighted mean that fits the run's error feedback.
        adjust_mask: decides the next global pruning mask; None = dense.
        optimise: server optimizer, from the aggregate to the next parameters.
        teach: distillation on the server after aggregation.
        unite: couples the models of a federation with several capacities.
        calibrate: makes the mask rule anew after each round, from measurements; it takes the place of `adjust_mask`.
        downlink: chooses the value type of each tensor that is sent.
        account: further numbers for the round's log.
        config: scalars that travel to the clients in `task.config`.
    """

    aggregate: Aggregate = mean
    adjust_mask: MaskRule | None = None
    optimise: Optimise = accept
    teach: Teach = untaught
    unite: Unite = apart
    calibrate: Calibrate | None = None
    downlink: Downlink = as_configured
    account: Account = nothing
    config: Mapping[str, Scalar] = field(default_factory=dict)
