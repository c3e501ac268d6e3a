"""Importance scores: non-negative, of the shape of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fl_sim.core.types import Grads, Params, Scores, UserError

Score = Callable[[Params, Grads | None], Scores]
"""(prunable parameters, gradients if there are any) -> scores."""


def magnitude(params: Params, grads: Grads | None = None) -> Scores:
    """|w|; gradients are not looked at."""
    return {name: value.detach().abs() for name, value in params.items()}


def gradient(params: Params, grads: Grads | None) -> Scores:
    """|g|, the growth criterion of RigL (Evci et al., 2020). Raises UserError without gradients."""
    return {name: grad.abs() for name, grad in _given(params, grads).items()}


def saliency(params: Params, grads: Grads | None) -> Scores:
    """|w * g|, the first-order change of the loss (Molchanov et al., 2017). Raises UserError without gradients."""
    return {name: (params[name].detach() * grad).abs() for name, grad in _given(params, grads).items()}


def random(params: Params, rng: torch.Generator) -> Scores:
    """Score weights at random: independent and uniform in [0, 1), float32.

    The numbers are drawn on the generator's device and moved to the parameters'.
    """
    return {
        name: torch.rand(value.shape, generator=rng, device=rng.device).to(value.device)
        for name, value in params.items()
    }


@dataclass(frozen=True)
class Random:
    """`random` from a seed: the same scores for the same shapes, so that masks made of them are nested."""

    seed: int = 0

    def __call__(self, params: Params, grads: Grads | None = None) -> Scores:
        return random(params, torch.Generator().manual_seed(self.seed))


def _given(params: Params, grads: Grads | None) -> Grads:
    missing = [name for name in params if grads is None or name not in grads]
    if grads is None or missing:
        raise UserError(f"this score needs gradients; there are none for {', '.join(missing[:3]) or 'any parameter'}")
    return {name: grads[name].detach() for name in params}
