"""Masks by what clients' gradients say of all weights: SSFL and PruneFL.

SSFL (Ohib et al., 2025, arXiv 2405.09037): before training each client sends the saliency |w g| of every weight (SNIP); the
server keeps the `density` share with the largest mean, once and for all. The saliency of the mean gradient is taken here.

PruneFL (Jiang et al., 2022, arXiv 1909.12326): every few rounds the server asks for gradients and keeps the weights
that maximise (sum of g_j^2) / (c + number of weights kept): most decrease of the loss for the time of a round. With equal time
for each weight those are the k largest g_j^2, for the best k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fl_sim.core.types import Grads, Mask, MaskRule, Params, UserError
from fl_sim.runtime.server_context import ServerContext
from fl_sim.sparsity import OneShot, PruneTo
from fl_sim.sparsity.allocation import global_topk_mask
from fl_sim.sparsity.rules import no_mask
from fl_sim.sparsity.scores import saliency
from strategies.base import Method
from strategies.calibration import Ask
from strategies.published.feddst import mean_of
from strategies.server_step import ServerState


@dataclass(frozen=True)
class SalientAtStart:
    """SSFL's mask: made before round 1."""

    density: float

    def __post_init__(self) -> None:
        OneShot(0, self.density)

    def __call__(self, context: ServerContext, ask: Ask, state: ServerState) -> MaskRule:
        if state.round:
            return no_mask
        gradients = mean_of(ask.gradients(state, 1.0))

        def score(params: Params, grads: Grads | None) -> Params:
            return saliency(params, gradients)

        return PruneTo(OneShot(0, self.density), score=score)


@dataclass(frozen=True)
class MostForTheTime:
    """PruneFL's mask, anew every few rounds.

    Attributes:
        every: rounds between two masks.
        overhead: c, the time of a round that no weight takes, in times of all weights.
    """

    every: int
    overhead: float

    def __post_init__(self) -> None:
        if self.every < 1 or not self.overhead > 0:
            raise UserError(f"strategy: every = {self.every} must be at least 1, overhead = {self.overhead} above 0")

    def __call__(self, context: ServerContext, ask: Ask, state: ServerState) -> MaskRule:
        if state.round % self.every:
            return no_mask
        gradients = mean_of(ask.gradients(state, 1.0))
        return lambda number, mask, params, grads: self.chosen(gradients)

    def chosen(self, gradients: Params) -> Mask:
        """The weights with the k largest squared gradients, for the k that maximises their sum over c + k."""
        squares = {name: value.double().square() for name, value in gradients.items()}
        ranked = torch.cat([value.flatten() for value in squares.values()]).sort(descending=True).values
        time = self.overhead * len(ranked) + torch.arange(1, len(ranked) + 1)
        count = int((ranked.cumsum(0) / time).argmax()) + 1
        return global_topk_mask(squares, count / len(ranked))


def ssfl(*, density: float = 0.5) -> Method:
    """SSFL's server; its clients are those of FedAvg.

    Args:
        density: share of the prunable weights that is kept.
    """
    return Method(calibrate=SalientAtStart(density))


def prunefl(*, every: int = 5, overhead: float = 0.1) -> Method:
    """PruneFL's server; its clients are those of FedAvg.

    Args:
        every: rounds between two masks.
        overhead: time of a round that no weight takes, in times of all weights, above 0.
    """
    return Method(calibrate=MostForTheTime(every, overhead))
