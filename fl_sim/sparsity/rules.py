"""Mask rules: compositions of score, allocation and schedule; the same type on both sides of the wire.

rule = chain(PruneTo(Cubic(5, 50, 0.1)), PruneAndGrow(Cosine(0.3, 75), every=5))
mask = rule(round, mask, params, pseudo_gradient)

A rule returns the very mask it received when nothing changes, and None while the model is dense. Round 0 is before
anything is sent: there are no gradients, and a mask made then is that of the first round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fl_sim.core.schedules import Schedule
from fl_sim.core.seeding import derive
from fl_sim.core.types import Grads, Mask, MaskRule, Params, Scores, UserError
from fl_sim.sparsity.allocation import Allocate, global_topk
from fl_sim.sparsity.masks import alive, prune_and_grow, size, topk_mask
from fl_sim.sparsity.scores import Score, gradient, magnitude, random
from fl_sim.sparsity.selection import select

Growth = Callable[[int, Params, Grads | None], Scores]
"""(round, prunable parameters, gradients if there are any) -> scores; the highest of the dead are grown."""


def no_mask(number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
    """Keep whatever mask there is, or none."""
    return mask


def keep_zeros(number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
    """Mask rule: weights that are zero in the initial model (round 0) stay zero."""
    if number > 0:
        return mask
    found = {name: value != 0 for name, value in params.items()}
    return None if all(bool(m.all()) for m in found.values()) else found


@dataclass(frozen=True, eq=False)
class StaticMask:
    """Mask rule: a fixed mask from the first call on, for instance one made of random scores."""

    mask: Mask

    def __call__(self, number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
        return self.mask


@dataclass(frozen=True)
class PruneTo:
    """Prune to a scheduled density; masks are nested: what is pruned stays pruned.

    Attributes:
        schedule: round -> density.
        allocate: how many each tensor keeps.
        score: what is kept first.
        min_keep: survivors of each tensor at least, or all that are still alive in it if those are fewer.
    """

    schedule: Schedule
    allocate: Allocate = global_topk
    score: Score = magnitude
    min_keep: int = 0

    def __call__(self, number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
        target = self.schedule(number)
        total = size(params)
        if round(target * total) >= (total if mask is None else alive(mask)):
            return mask
        scores = self.score(params, grads)
        if mask is None:
            return topk_mask(scores, self.allocate(scores, target, min_keep=self.min_keep))
        scores = alive_first(scores, mask)
        return topk_mask(scores, _within(mask, scores, self.allocate(scores, target, min_keep=self.min_keep)))


def alive_first(scores: Scores, mask: Mask) -> Scores:
    """Rank the weights that are alive above all pruned ones, whose scores become 0.

    An alive weight may be exactly zero, a regrown one for instance; without the shift it would tie with pruned ones.
    """
    return {name: torch.where(mask[name], score + torch.finfo(score.dtype).tiny, 0.0) for name, score in scores.items()}


def _within(mask: Mask, scores: Scores, keep: dict[str, int]) -> dict[str, int]:
    """Cap each tensor's count at its weights that are alive; the rest goes to the highest scores of the others.

    Allocations by shape ask for this when the earlier mask was made by another one.
    """
    room = {name: int(m.count_nonzero()) for name, m in mask.items()}
    clipped = {name: min(count, room[name]) for name, count in keep.items()}
    if clipped == keep:
        return keep
    return dict(
        zip(scores, select(list(scores.values()), sum(keep.values()), floors=list(clipped.values())), strict=True)
    )


# Key element of random growth, apart from the purposes that fl_sim.core.seeding names.
GROWTH_PURPOSE = 100


@dataclass(frozen=True)
class GrowAtRandom:
    """Uniform random growth, another draw in every round (SET, Mocanu et al., 2018)."""

    seed: int = 0

    def __call__(self, number: int, params: Params, grads: Grads | None) -> Scores:
        return random(params, torch.Generator().manual_seed(derive(self.seed, number, GROWTH_PURPOSE)))


def grow_by_gradient(number: int, params: Params, grads: Grads | None) -> Scores:
    """The largest gradients grow (RigL, Evci et al., 2020); on the server the pseudo-gradient stands for them."""
    return gradient(params, grads)


@dataclass(frozen=True)
class PruneAndGrow:
    """Exchange a share of every tensor's alive coordinates, density unchanged; nothing while there is no mask.

    RigL with the defaults, SET with `grow=GrowAtRandom(seed)`. What is grown holds 0 if dead coordinates are kept at 0,
    which masked training does; a coordinate that an earlier rule of a chain pruned in this round comes back as it was.

    Attributes:
        fraction: round -> share that is exchanged; `Constant(0.3)`, or `Cosine(0.3, end)` as RigL has it.
        every: rounds between exchanges; they happen in multiples of it, and not in round 0, which has no gradients.
        drop: the lowest of these go.
        grow: the highest of these come.
    """

    fraction: Schedule
    every: int = 1
    drop: Score = magnitude
    grow: Growth = grow_by_gradient

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"every = {self.every}: must be at least 1 round")

    def __call__(self, number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
        fraction = self.fraction(number)
        if mask is None or number == 0 or number % self.every or fraction == 0:
            return mask
        return prune_and_grow(mask, self.drop(params, grads), self.grow(number, params, grads), fraction)


@dataclass(frozen=True)
class Chain:
    """Rules one after another, each on the mask that the one before it returned."""

    rules: tuple[MaskRule, ...]

    def __call__(self, number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
        for rule in self.rules:
            mask = rule(number, mask, params, grads)
        return mask


def chain(*rules: MaskRule) -> Chain:
    """The composition of rules, first one first."""
    return Chain(rules)
