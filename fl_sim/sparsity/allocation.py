"""Allocation: scores and a density -> how many coordinates each tensor keeps.

All allocations have one signature, `(scores, density, *, min_keep=0) -> {name: kept}`, and the counts sum to exactly
`round(density * n)` over the n scored coordinates. They read scores and shapes only, so a coordinate that a mask has
pruned must come with score 0; rules take care of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from fl_sim.core.types import FlatMask, Mask, Scores, UserError
from fl_sim.sparsity.masks import size, topk_mask
from fl_sim.sparsity.scores import Random
from fl_sim.sparsity.selection import are_few, select, top_of_few


class Allocate(Protocol):
    """`(scores, density, *, min_keep=0)` -> coordinates that each tensor keeps, in sum round(density * n)."""

    def __call__(self, scores: Scores, density: float, /, *, min_keep: int = 0) -> dict[str, int]: ...


def budget(scores: Scores, density: float, min_keep: int) -> tuple[int, dict[str, int]]:
    """(coordinates to keep in all, coordinates that each tensor keeps at least).

    Raises:
        UserError: a density outside 0..1, a negative minimum, or minima that exceed the budget together.
    """
    if not 0 <= density <= 1:
        raise UserError(f"density = {density}: must be between 0 and 1")
    if min_keep < 0:
        raise UserError(f"min_keep = {min_keep}: must not be negative")
    total = size(scores)
    floors = {name: min(min_keep, score.numel()) for name, score in scores.items()}
    kept, least = round(density * total), sum(floors.values())
    if kept < least:
        raise UserError(
            f"density = {density} keeps {kept} of {total} weights, fewer than min_keep = {min_keep} in each of "
            f"{len(scores)} tensors; the largest feasible sparsity is {1 - least / total:.6f}"
        )
    return kept, floors


def global_topk(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """Global top-k: one ranking over all tensors; each keeps as many as it has among the highest scores.

    `min_keep` protects the top-min(min_keep, n_l) of every tensor and ranks the rest together: among all choices of
    that size with that minimum, the kept scores have the largest sum. Ties go to the earlier tensor, then the lower
    index. Global magnitude pruning with a minimum threshold, arXiv 2209.14624; exact where the published procedure
    rescales layer sparsities (`global_published`). Linear time; memory beyond the scores is a few MB.
    """
    kept, floors = budget(scores, density, min_keep)
    return dict(zip(scores, select(list(scores.values()), kept, floors=list(floors.values())), strict=True))


def global_topk_mask(scores: Scores, density: float) -> Mask:
    """`topk_mask` of `global_topk`: where the highest scores of all tensors together are. Raises what those raise."""
    tensors = list(scores.values())
    if not are_few(tensors):
        return topk_mask(scores, global_topk(scores, density))
    kept, _ = budget(scores, density, 0)
    return FlatMask.view(top_of_few(tensors, kept), tuple(scores), tuple([tensor.shape for tensor in tensors]))


def global_published(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """Global magnitude pruning with the minimum threshold as its authors' public code has it (arXiv 2209.14624).

    The code takes the layer sparsities of one global threshold, sets those of layers not larger than the minimum to 0,
    and then repeats: scale all by target / achieved, cap each at what leaves `min_keep`. Every layer that is not capped
    has been scaled by the same factor, so the repetition's limit is an apportionment of the pruned weights in
    proportion to what the global threshold pruned, under the caps; that is computed here in closed form.

    Deviations: whole counts by largest remainder that meet the target exactly (the code is off by a few weights: it
    ranks one uninitialised value and keeps the k-th weight itself), and an error where the code never returns.

    Raises:
        UserError: as `global_topk`; also where layers without globally pruned weights, which scaling cannot reach,
            would have to be pruned.
    """
    kept, floors = budget(scores, density, min_keep)
    vanilla = global_topk(scores, density)
    sizes = {name: score.numel() for name, score in scores.items()}
    pruned = {name: sizes[name] - vanilla[name] for name in scores}
    caps = {name: sizes[name] - floors[name] if pruned[name] else 0 for name in scores}
    total = sum(sizes.values())
    if total - kept > sum(caps.values()):
        raise UserError(
            f"density = {density} with min_keep = {min_keep} is out of reach of the published procedure; "
            f"its largest feasible sparsity here is {sum(caps.values()) / total:.6f}"
        )
    removed = _apportion(total - kept, pruned, dict.fromkeys(scores, 0), caps)
    return {name: sizes[name] - removed[name] for name in scores}


def uniform(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """Uniform allocation: the same density in every tensor, as far as whole numbers and `min_keep` allow."""
    return _proportional({name: score.numel() for name, score in scores.items()}, scores, density, min_keep)


def erk(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """Erdos-Renyi-Kernel: a tensor's density is proportional to (sum of its dimensions) / (their product).

    Evci et al., 2020, section 3, after Mocanu et al., 2018; tensors that would exceed 1 are full and the rest is
    scaled up.
    """
    return _proportional({name: max(1, sum(score.shape)) for name, score in scores.items()}, scores, density, min_keep)


def lamp(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """Global ranking of LAMP scores, s^2 / sum of the squares not smaller in its tensor (Lee et al., 2021, equation 3).

    `scores` are magnitudes. The largest weight of a tensor scores 1, so no tensor is emptied while others keep two.
    O(n log n) time; about five times the memory of the largest tensor, and twice that of all.
    """
    return global_topk({name: _lamp(score) for name, score in scores.items()}, density, min_keep=min_keep)


def _lamp(score: Tensor) -> Tensor:
    # In order of size, not of position: a count does not depend on the order within a tensor.
    ordered = score.detach().reshape(-1).double().square().sort().values
    remaining = ordered.flip(0).cumsum(0).flip(0)
    return torch.where(remaining > 0, ordered / remaining, 0.0)


@dataclass(frozen=True)
class RandomTopk:
    """Counts of a global ranking of random scores: every coordinate is as likely as any other, whatever its score."""

    seed: int = 0

    def __call__(self, scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
        return global_topk(Random(self.seed)(scores), density, min_keep=min_keep)


MINIMUM_THRESHOLDS: Mapping[str, Allocate] = {"exact": global_topk, "published": global_published}


@dataclass(frozen=True)
class GlobalMagnitude:
    """Global ranking with the minimum threshold in the published unit.

    Attributes:
        min_threshold: percent of *all* scored weights that every tensor keeps at least (or is kept whole, if smaller);
            0.05 is the default of the authors' code.
        mode: "exact" (`global_topk`) or "published" (`global_published`).
    """

    min_threshold: float = 0.0
    mode: str = "exact"

    def __post_init__(self) -> None:
        if not 0 <= self.min_threshold <= 100:
            raise UserError(f"min_threshold = {self.min_threshold}: a percentage, must be between 0 and 100")
        if self.mode not in MINIMUM_THRESHOLDS:
            raise UserError(f"mode = {self.mode!r}: allowed: {', '.join(MINIMUM_THRESHOLDS)}")

    def __call__(self, scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
        least = max(min_keep, int(size(scores) * self.min_threshold / 100))
        return MINIMUM_THRESHOLDS[self.mode](scores, density, min_keep=least)


def _proportional(shares: dict[str, int], scores: Scores, density: float, min_keep: int) -> dict[str, int]:
    kept, floors = budget(scores, density, min_keep)
    return _apportion(kept, shares, floors, {name: score.numel() for name, score in scores.items()})


def _apportion(
    total: int, shares: Mapping[str, int], floors: Mapping[str, int], caps: Mapping[str, int]
) -> dict[str, int]:
    """Round to whole numbers that sum to `total`, in proportion to `shares` within floors and caps; largest remainders first.

    x_l = clip(factor * share_l, floor_l, cap_l), with the one factor for which they sum to `total`. Fractions keep it
    exact: a tensor's count does not depend on rounding errors. `total` lies between the sums of floors and caps, and
    a share is 0 only where the cap is 0.
    """
    factor = _factor(
        total,
        [(shares[n], floors[n], caps[n]) for n in shares if shares[n] and floors[n] < caps[n]],
        sum(floors[n] for n in shares if not shares[n] or floors[n] >= caps[n]),
    )
    real = {n: max(Fraction(floors[n]), min(Fraction(caps[n]), factor * shares[n])) for n in shares}
    whole = {n: int(x) for n, x in real.items()}
    # Sorting is stable: equal remainders go to the earlier tensor.
    for name in sorted(whole, key=lambda n: whole[n] - real[n])[: total - sum(whole.values())]:
        whole[name] += 1
    return whole


def _factor(total: int, bounded: Sequence[tuple[int, int, int]], fixed: int) -> Fraction:
    """The factor f with fixed + sum of clip(f * share, floor, cap) = total: a search over the kinks of that sum."""

    def held(factor: Fraction) -> Fraction:
        return fixed + sum(
            (max(Fraction(low), min(Fraction(high), factor * p)) for p, low, high in bounded), Fraction()
        )

    kinks = sorted({Fraction(edge, p) for p, low, high in bounded for edge in (low, high)} | {Fraction()})
    first, last = 0, len(kinks)
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if held(kinks[middle]) <= total else (first, middle)
    start = kinks[first]
    slope = sum(p for p, low, high in bounded if low <= start * p < high)
    return start + (total - held(start)) / slope if slope else start
