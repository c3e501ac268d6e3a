"""A mask that everybody can make alone: a function of the round, never of anybody's data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import Mask, Params
from fl_sim.sparsity.allocation import global_topk_mask


@dataclass(frozen=True)
class Shared:
    """Coordinates drawn at random each round, the same for all: random sparsification (Konecny et al., 2016, "random mask").

    Attributes:
        density: share of the prunable coordinates.
        seed: the run's seed.
    """

    density: float
    seed: int

    def __call__(self, number: int, params: Params) -> Mask:
        """The mask of round `number` over these prunable parameters, whose values do not matter."""
        rng = generator(self.seed, number, Purpose.SHARED_MASK)
        scores = {name: torch.rand(value.shape, generator=rng) for name, value in params.items()}
        return global_topk_mask(scores, self.density)
