"""The slots of a server algorithm: the functions that `Method` composes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fl_sim.core.types import MaskRule, Scalar, UserError
from strategies.aggregation import mean
from strategies.calibration import Calibrate
from strategies.distillation import CoupleModels, ServerDistillation, no_distillation, no_exchange
from strategies.downlink_types import Downlink, configured_types
from strategies.server_step import Aggregate, Optimise, replace_params

RoundMetrics = Callable[[int], Mapping[str, float]]
"""Rounds finished -> numbers of the algorithm's own for the round's log, for instance the privacy spent."""


def no_metrics(rounds: int) -> Mapping[str, float]:
    """Add no numbers of its own."""
    return {}


@dataclass(frozen=True)
class Slots:
    """Functions that process a round's updates; each has a default.

    Attributes:
        aggregate: (state, updates) -> parameters; the default is a weighted mean that fits the run's error feedback.
        adjust_mask: decides the next global pruning mask; None = dense.
        optimise: server optimizer, from the aggregate to the next parameters.
        distil: distillation on the server after aggregation.
        couple_models: couples the models of a federation with several capacities.
        calibrate: makes the mask rule anew after each round, from measurements; it takes the place of `adjust_mask`.
        downlink: chooses the value type of each tensor that is sent.
        account: further numbers for the round's log.
        config: numbers, texts and bytes that travel to the clients in `task.config`; an option of the config's `client`
            table takes the place of the one with its name.
    """

    aggregate: Aggregate = mean
    adjust_mask: MaskRule | None = None
    optimise: Optimise = replace_params
    distil: ServerDistillation = no_distillation
    couple_models: CoupleModels = no_exchange
    calibrate: Calibrate | None = None
    downlink: Downlink = configured_types
    account: RoundMetrics = no_metrics
    config: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in self.config.items():
            if not isinstance(value, Scalar):
                raise UserError(
                    f"strategy: config[{key!r}] = {value!r}: only numbers, texts and bytes travel to clients"
                )
