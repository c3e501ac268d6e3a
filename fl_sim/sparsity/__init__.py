"""Pruning from orthogonal parts: what matters (scores), how much where (allocation), which ones (masks), when (schedules).

scores = magnitude(params)
mask = topk_mask(scores, global_topk(scores, 0.1))
"""

from fl_sim.sparsity.allocation import Allocate, erk, global_topk, lamp, uniform
from fl_sim.sparsity.masks import apply_mask, density, intersect, prune_and_grow, topk_mask
from fl_sim.sparsity.rules import PruneTo
from fl_sim.sparsity.schedules import Cubic, Iterative, OneShot, Schedule
from fl_sim.sparsity.scores import magnitude, saliency

__all__ = [
    "Allocate",
    "Cubic",
    "Iterative",
    "OneShot",
    "PruneTo",
    "Schedule",
    "apply_mask",
    "density",
    "erk",
    "global_topk",
    "intersect",
    "lamp",
    "magnitude",
    "prune_and_grow",
    "saliency",
    "topk_mask",
    "uniform",
]
