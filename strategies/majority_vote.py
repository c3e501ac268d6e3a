"""Majority vote over the signs of the clients' changes (signSGD; Bernstein et al., 2018, algorithm 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fl_sim.core.types import Params, Update, UserError
from strategies.aggregation import zero_filled
from strategies.server_step import ServerState, with_statistics
from strategies.sums import Sums


@dataclass(frozen=True)
class MajorityVote:
    """x = x_old + lr sign(sum_k sign(x_k - x_old)): every client has one vote a coordinate, whatever its samples.

    A change of 0 and a coordinate that was not sent abstain; a tie leaves the coordinate as it is. BatchNorm statistics are no
    parameters: they take the weighted mean.

    Attributes:
        lr: step of every coordinate, above 0.
    """

    lr: float

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"strategy.lr = {self.lr}: must be above 0")

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        schema, old = state.schema, state.schema.flat(state.params)
        votes, sums = torch.zeros_like(old), Sums.zeros(schema, state.scratch)
        for update in updates:
            sums.add(update)
            vote = torch.sign(schema.flat(update.params) - old)
            if update.mask is not None:
                vote[: schema.prunable_size] *= schema.flat_mask(update.mask)
            votes += vote
        return with_statistics(schema, old + self.lr * torch.sign(votes), zero_filled(state, sums))
