"""Pruning from orthogonal parts: what matters (scores), how much where (allocation), which ones (masks), when (schedules).

scores = magnitude(params)
mask = global_topk_mask(scores, 0.1)

`rules` composes them into what a server or client calls every round.
"""

from fl_sim.core.schedules import Constant, Cosine, Cubic, Exponential, Iterative, Linear, OneShot, Schedule
from fl_sim.sparsity.allocation import (
    Allocate,
    GlobalMagnitude,
    RandomTopk,
    erk,
    global_published,
    global_topk,
    global_topk_mask,
    lamp,
    uniform,
)
from fl_sim.sparsity.knapsack import min_distortion
from fl_sim.sparsity.masks import apply_mask, density, intersect, layer_densities, prune_and_grow, topk_mask
from fl_sim.sparsity.rate_distortion import RateDistortion
from fl_sim.sparsity.rules import (
    Chain,
    GrowAtRandom,
    PruneAndGrow,
    PruneTo,
    StaticMask,
    chain,
    grow_by_gradient,
    keep_zeros,
    no_mask,
)
from fl_sim.sparsity.scores import Random, Score, gradient, magnitude, random, saliency
from fl_sim.sparsity.shared_mask import Shared

__all__ = [
    "Allocate",
    "Chain",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "GlobalMagnitude",
    "GrowAtRandom",
    "Iterative",
    "Linear",
    "OneShot",
    "PruneAndGrow",
    "PruneTo",
    "Random",
    "RandomTopk",
    "RateDistortion",
    "Schedule",
    "Score",
    "Shared",
    "StaticMask",
    "apply_mask",
    "chain",
    "density",
    "erk",
    "global_published",
    "global_topk",
    "global_topk_mask",
    "gradient",
    "grow_by_gradient",
    "intersect",
    "keep_zeros",
    "lamp",
    "layer_densities",
    "magnitude",
    "min_distortion",
    "no_mask",
    "prune_and_grow",
    "random",
    "saliency",
    "topk_mask",
    "uniform",
]
