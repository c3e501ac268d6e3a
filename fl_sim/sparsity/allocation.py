"""How much where: scores and a density -> how many coordinates each tensor keeps.

All allocations have the signature `(scores, density, *, min_keep=0) -> {name: kept}`, and the counts sum to exactly
`round(density * n)` over the n scored coordinates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fl_sim.sparsity.masks import Selection, select
from fl_sim.types import Scores, UserError

Allocate = Callable[..., dict[str, int]]


def _budget(scores: Scores, density: float, min_keep: int) -> tuple[int, dict[str, int]]:
    """(coordinates to keep, floor of each tensor).

    Raises:
        UserError: a density outside 0..1, or a minimum that alone exceeds the budget.
    """
    if not 0 <= density <= 1:
        raise UserError(f"density = {density}: must be between 0 and 1")
    total = sum(score.numel() for score in scores.values())
    floors = {name: min(min_keep, score.numel()) for name, score in scores.items()}
    budget, least = round(density * total), sum(floors.values())
    if budget < least:
        raise UserError(
            f"density = {density} keeps {budget} of {total} weights, fewer than min_keep = {min_keep} in each of "
            f"{len(scores)} tensors; the largest feasible sparsity is {1 - least / total:.6f}"
        )
    return budget, floors


def global_topk(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """One ranking over all tensors: each keeps as many as it has among the highest scores.

    `min_keep` protects the top-min(min_keep, n_l) of every tensor first and ranks the rest together: among all choices
    of that size with that minimum, the kept scores have the largest possible sum. Ties go to the earlier tensor and
    lower index. Global magnitude pruning with minimum threshold, arXiv 2209.14624; exact where the published procedure
    rescales layer sparsities.
    """
    budget, floors = _budget(scores, density, min_keep)
    kept = dict(floors)
    free = budget - sum(floors.values())
    rest = {name: _without_top(score.reshape(-1), floors[name]) for name, score in scores.items()}
    chosen = select(list(rest.values()), free)
    for name, selection in zip(rest, chosen, strict=True):
        kept[name] += selection.count
    return kept


def _without_top(score: Tensor, count: int) -> Tensor:
    """The scores that are not among the `count` highest, as a bag (their order does not matter to a count)."""
    if count == 0:
        return score
    if count >= score.numel():
        return score[:0]
    return torch.topk(score, score.numel() - count, largest=False, sorted=False).values


def _fill(shares: dict[str, float], scores: Scores, density: float, min_keep: int) -> dict[str, int]:
    """Whole counts in proportion to `shares`, saturated at full tensors, largest remainders first."""
    budget, floors = _budget(scores, density, min_keep)
    sizes = {name: score.numel() for name, score in scores.items()}
    real = {name: float(floor) for name, floor in floors.items()}
    open_, left = set(shares), float(budget - sum(floors.values()))
    while left > 1e-9 and open_:
        weight = sum(shares[name] for name in open_)
        if weight == 0:
            break
        step = {name: left * shares[name] / weight for name in open_}
        left = 0.0
        for name, extra in step.items():
            room = sizes[name] - real[name]
            real[name] += min(extra, room)
            left += max(0.0, extra - room)
        open_ = {name for name in open_ if sizes[name] - real[name] > 1e-9}
    kept = {name: min(sizes[name], int(value + 1e-9)) for name, value in real.items()}
    short = budget - sum(kept.values())
    for name in sorted(kept, key=lambda n: (kept[n] - real[n], list(kept).index(n))):
        if short and kept[name] < sizes[name]:
            kept[name] += 1
            short -= 1
    for name in kept:
        extra = min(short, sizes[name] - kept[name])
        kept[name] += extra
        short -= extra
    return kept


def uniform(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """The same density in every tensor."""
    return _fill({name: float(s.numel()) for name, s in scores.items()}, scores, density, min_keep)


def erk(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """Erdos-Renyi-Kernel: a tensor's density is proportional to (sum of its dimensions) / (their product).

    Evci et al., 2020, section 3; tensors that would exceed 1 are full and the rest is scaled up.
    """
    return _fill({name: float(sum(s.shape)) for name, s in scores.items()}, scores, density, min_keep)


def lamp(scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
    """Global ranking of LAMP scores, s^2 / sum of the squares not smaller in its tensor (Lee et al., 2021, equation 3).

    `scores` are magnitudes. The largest weight of a tensor scores 1, so no tensor is emptied while others keep two.
    """
    return global_topk({name: _lamp(score) for name, score in scores.items()}, density, min_keep=min_keep)


def _lamp(score: Tensor) -> Tensor:
    squares = score.reshape(-1).double().square()
    ordered, order = squares.sort()
    surviving = ordered.flip(0).cumsum(0).flip(0)
    values = torch.empty_like(squares)
    values[order] = torch.where(surviving > 0, ordered / surviving, 0.0)
    return values.reshape(score.shape)


__all__ = ["Allocate", "Selection", "erk", "global_topk", "lamp", "uniform"]
