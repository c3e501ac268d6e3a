"""FedMef (Huang et al., 2024, arXiv 2403.14737): weights that are about to go are pressed towards zero first.

Budget-aware extrusion lets the others learn what they knew: before an exchange, clients add lambda_t / 2 times the squared norm
of the `fraction` of each layer's living weights with the smallest magnitude, those that the exchange drops; lambda_t grows from
0 to `strength` between two exchanges. The server is FedDST's: it drops those weights and grows as many where the clients'
gradients are largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.local import LocalClient, weighing
from fl_sim.core.types import Mask, Task, UserError
from fl_sim.data.weights import Batch
from fl_sim.models import prunable_names
from fl_sim.sparsity import magnitude, topk_mask
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training
from fl_sim.training.losses import Loss


@dataclass(frozen=True)
class Extrusion:
    """The loss of a round: the task's, and the pressure on the smallest weights that live.

    Attributes:
        strength: lambda before an exchange, at least 0.
        fraction: share of each layer's living weights that is pressed.
        every: rounds between exchanges, as the server has it.
    """

    strength: float
    fraction: float
    every: int

    def __post_init__(self) -> None:
        if not self.strength >= 0 or not 0 < self.fraction <= 1 or self.every < 1:
            given = f"strength = {self.strength}, fraction = {self.fraction}, every = {self.every}"
            raise UserError(f"client: {given}: must be at least 0, above 0 and at most 1, at least 1")

    def smallest(self, task: Task, ctx: ClientContext) -> Mask:
        """The living weights that the next exchange would drop."""
        weights = {name: task.params[name].cpu() for name in prunable_names(ctx.model) if name in task.params}
        alive = task.mask or {name: torch.ones_like(value, dtype=torch.bool) for name, value in weights.items()}
        least = magnitude(weights)
        scores = {n: torch.where(alive[n].cpu(), least[n].max() + 1 - least[n], 0.0) for n in weights}
        return topk_mask(scores, {n: round(self.fraction * int(alive[n].sum())) for n in weights})

    @weighing
    def __call__(self, task: Task, ctx: ClientContext) -> Loss:
        pressure = self.strength * ((task.round - 1) % self.every + 1) / self.every
        chosen, inner = self.smallest(task, ctx), ctx.loss

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = inner(model, batch)
            for name, parameter in model.named_parameters():
                if name in chosen:
                    value = value + pressure / 2 * parameter[chosen[name].to(parameter.device)].square().sum()
            return value

        loss.weighs = True  # type: ignore[attr-defined]
        return loss


def client(*, training: Training, strength: float = 0.1, fraction: float = 0.3, every: int = 5) -> Client:
    """FedMef's client. Goes with `strategies.published.feddst:server`.

    Args:
        training: the config's `[training]` table.
        strength: weight of the pressure in the round before an exchange, at least 0; 0 is FedDST.
        fraction: share of each layer's living weights that is pressed, as the server's, above 0 and at most 1.
        every: rounds between exchanges, as the server's.
    """
    return LocalClient(training, loss=Extrusion(strength, fraction, every))
