"""FedDST (Bibikar et al., 2022, arXiv 2112.09824) with RigL's growth (Evci et al., 2020, arXiv 1911.11134, algorithm 1).

The model is sparse from the start, with ERK layer densities. Every few rounds each layer drops its smallest weights and grows
as many where the gradient is largest (RigL, algorithm 1, with its cosine schedule). Clients that train a sparse
model have no gradient of the rest: the server asks a cohort for the largest of them, in messages with bytes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fl_sim.core.types import Grads, MaskRule, Params, Scores, UserError
from fl_sim.runtime.server_context import ServerContext
from fl_sim.sparsity import Cosine, OneShot, PruneAndGrow, PruneTo, chain, erk
from strategies.base import Method
from strategies.calibration import Ask
from strategies.server_step import ServerState


def mean_of(answers: Sequence[tuple[Params, int]]) -> Params:
    """Mean of tensors, weighted with the samples behind each."""
    total = sum(count for _, count in answers)
    return {name: sum(each[name] * (count / total) for each, count in answers) for name in answers[0][0]}  # type: ignore[misc]


@dataclass(frozen=True)
class GrowByGradient:
    """Mask rule of RigL whose gradients clients are asked for, in rounds that exchange weights alone.

    Attributes:
        density: share of the prunable weights that is kept.
        fraction: share of each layer that is exchanged at first; falls along half a cosine to 0 in round `end`.
        every: rounds between exchanges.
        share: of the pruned weights, those whose gradients a client tells.
    """

    density: float
    fraction: float
    every: int
    end: int
    share: float

    def __post_init__(self) -> None:
        for name, value in {"fraction": self.fraction, "share": self.share}.items():
            if not 0 < value <= 1:
                raise UserError(f"strategy.{name} = {value}: must be above 0 and at most 1")
        self._prune()
        PruneAndGrow(Cosine(self.fraction, self.end), self.every)

    def _prune(self) -> MaskRule:
        return PruneTo(OneShot(0, self.density), erk)

    def __call__(self, context: ServerContext, ask: Ask, state: ServerState) -> MaskRule:
        prune = self._prune()
        schedule = Cosine(self.fraction, self.end)
        if state.mask is None or state.round % self.every or not schedule(state.round):
            return prune
        gradients = mean_of(ask.gradients(state, self.share))

        def grow(number: int, params: Params, grads: Grads | None) -> Scores:
            return {name: value.abs() for name, value in gradients.items()}

        return chain(prune, PruneAndGrow(schedule, self.every, grow=grow))


def server(
    *, density: float = 0.2, fraction: float = 0.3, every: int = 5, end: int = 100, share: float = 0.2
) -> Method:
    """FedDST's server; its clients are those of FedAvg.

    Args:
        density: share of the prunable weights that is kept.
        fraction: share of each layer's weights that an exchange drops and grows, above 0 and at most 1.
        every: rounds between exchanges.
        end: round of the last exchange.
        share: of the pruned weights, those whose gradients a client tells: the largest; above 0 and at most 1.
    """
    return Method(calibrate=GrowByGradient(density, fraction, every, end, share))
