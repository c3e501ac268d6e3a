"""Server optimizers with adaptive learning rates: FedAdagrad, FedAdam, FedYogi (Reddi et al., 2021, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_sim.core.types import Params, UserError
from strategies.robust import is_statistic
from strategies.server_step import ServerState, with_statistics

SecondMoment = Callable[[Tensor, Tensor, float], Tensor]
"""(v before, squared mean change, beta2) -> v."""


def adagrad(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    """Sum of all squares."""
    return v + square


def adam(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    """Exponential mean of the squares."""
    return beta2 * v + (1 - beta2) * square


def yogi(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    """Moves towards the squares by at most `(1 - beta2) square`."""
    return v - (1 - beta2) * square * torch.sign(v - square)


@dataclass(frozen=True)
class Adaptive:
    """Adaptive server optimizer: `m = b1 m + (1 - b1) d`, `v = second(v, d^2)`, `x = x + lr m / (sqrt(v) + tau)`.

    d is the clients' mean change. m starts from 0 and v from tau^2; there is no bias correction. BatchNorm statistics take
    the aggregate as it is. A weight that the mask prunes and that grows again starts anew.

    Attributes:
        second: rule of the second moment.
        lr: server learning rate, above 0.
        beta1, beta2: decay of the moments, from 0 to below 1.
        tau: smallest denominator, above 0.
    """

    second: SecondMoment
    lr: float
    beta1: float
    beta2: float
    tau: float

    def __post_init__(self) -> None:
        for name, value in {"lr": self.lr, "tau": self.tau}.items():
            if not 0 < value < float("inf"):
                raise UserError(f"strategy.{name} = {value}: must be above 0")
        for name, value in {"beta1": self.beta1, "beta2": self.beta2}.items():
            if not 0 <= value < 1:
                raise UserError(f"strategy.{name} = {value}: must be from 0 to below 1")

    def __call__(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        schema = state.schema
        old = schema.flat(state.params)
        change = (schema.flat(aggregated) - old).masked_fill_(is_statistic(schema), 0.0)
        first, second = state.memory.get("m"), state.memory.get("v")
        m = torch.zeros_like(old) if first is None else first.clone()
        v = torch.full_like(old, self.tau**2) if second is None else second.clone()
        if state.mask is not None:
            dead = ~schema.flat_mask(state.mask)
            m[: len(dead)].masked_fill_(dead, 0.0)
            v[: len(dead)].masked_fill_(dead, self.tau**2)
        m = self.beta1 * m + (1 - self.beta1) * change
        v = self.second(v, change.square(), self.beta2)
        new = with_statistics(schema, old + self.lr * m / (v.sqrt() + self.tau), aggregated)
        return new, {"m": m, "v": v}
