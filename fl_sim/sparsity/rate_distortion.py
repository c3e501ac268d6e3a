"""Layer densities from measured distortion curves: the allocation of rate-distortion pruning, arXiv 2308.10438."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fl_sim.core.types import Scores, UserError
from fl_sim.sparsity.allocation import budget
from fl_sim.sparsity.knapsack import min_distortion
from fl_sim.sparsity.selection import select


@dataclass(frozen=True)
class RateDistortion:
    """Densities that minimise the summed output distortion under the budget of kept weights.

    The program is exact for the measured levels. What its whole levels leave of the budget goes to the highest scores
    of all tensors, so that the counts sum to round(density * n) like those of every allocation. Tensors that already
    hold zeros are only offered levels that they reach (the paper's monotone constraint). A level below `min_keep` keeps
    that many at the distortion measured without them.

    Attributes:
        curves: name -> distortion when floor(q/Q * n_l) of the tensor's n_l weights are pruned by magnitude, zeros
            first, and nothing else is; q = 0 ... Q.
    """

    curves: Mapping[str, Sequence[float]] = field(repr=False)

    def __call__(self, scores: Scores, density: float, *, min_keep: int = 0) -> dict[str, int]:
        """Counts as in `fl_sim.sparsity.allocation`. Raises UserError also where a tensor has no curve."""
        if missing := [name for name in scores if len(self.curves.get(name, ())) < 2]:
            raise UserError(f"curves: none with two levels or more for {', '.join(missing[:3])}")
        total, floors = budget(scores, density, min_keep)
        rates, lowest = [], []
        for name, score in scores.items():
            kept = kept_weights(score.numel(), len(self.curves[name]))
            alive = max(int(score.count_nonzero()), floors[name])
            lowest.append(next(q for q, count in enumerate(kept) if count <= alive))
            rates.append([max(count, floors[name]) for count in kept])
        levels = min_distortion(rates, [self.curves[name] for name in scores], total, minimum=lowest)
        least = [counts[q] for counts, q in zip(rates, levels, strict=True)]
        return dict(zip(scores, select(list(scores.values()), total, floors=least), strict=True))


def kept_weights(size: int, levels: int) -> list[int]:
    """Weights that a tensor of `size` keeps at each of `levels` levels, from all of them to none."""
    return [size - q * size // (levels - 1) for q in range(levels)]
