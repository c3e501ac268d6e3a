"""Mask rules: compositions of score, allocation and schedule; the same type on both sides of the wire."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fl_sim.sparsity.allocation import Allocate, global_topk
from fl_sim.sparsity.masks import density, topk_mask
from fl_sim.sparsity.schedules import Schedule
from fl_sim.sparsity.scores import magnitude
from fl_sim.types import Grads, Mask, Params


@dataclass(frozen=True)
class PruneTo:
    """Prune to a scheduled density; masks are nested: what is pruned stays pruned.

    Attributes:
        schedule: round -> density.
        allocate: how many each tensor keeps.
        min_keep: survivors of each tensor at least.
    """

    schedule: Schedule
    allocate: Allocate = global_topk
    min_keep: int = 0

    def __call__(self, number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
        target = self.schedule(number)
        if target >= (1.0 if mask is None else density(mask)):
            return mask
        scores = magnitude(params)
        if mask is not None:
            # Alive weights that happen to be zero rank above pruned ones, so re-pruning never un-prunes.
            scores = {
                name: torch.where(mask[name], score + torch.finfo(score.dtype).tiny, 0.0)
                for name, score in scores.items()
            }
        return topk_mask(scores, self.allocate(scores, target, min_keep=self.min_keep))
