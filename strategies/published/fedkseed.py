"""FedKSeed (Qin et al., 2024, arXiv 2312.06353): K seeds and a number for each are all that travels.

w = w_0 + sum_j a_j z_j with z_j ~ N(0, I) of seed j. A client's step draws a seed j and a batch, and moves a_j by
-lr g, g = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps): two forward passes, no gradient. The server
averages the K numbers. Both ways carry K float32, whatever the size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from clients.local import LocalClient
from clients.transformed import At
from fl_sim.core.types import Metrics, Task, Update, UserError
from fl_sim.models.interface import changed
from fl_sim.models.sequence import lstm
from fl_sim.models.simple import cnn_bn
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training, Trains, check_converged, endless
from fl_sim.training.losses import Loss

SEEDS, NAME = 256, "coefficients"
"""K; the paper's experiments have 1,024 and 4,096."""


@lru_cache(maxsize=2)
def directions(seeds: int, size: int) -> Tensor:
    """The vectors z_1 to z_K, (seeds, size), each made from its own seed; nobody sends them."""
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)])


class OfSeeds(nn.Module):
    """A frozen model moved along the directions of K seeds."""

    def __init__(self, inner: nn.Module, seeds: int = SEEDS) -> None:
        super().__init__()
        self.inner, self.coefficients = inner, nn.Parameter(torch.zeros(seeds))

    def flat(self) -> Tensor:
        """The weights where the model is."""
        start = torch.cat([value.flatten() for value in self.inner.parameters()])
        return start + self.coefficients @ directions(len(self.coefficients), len(start)).to(start.device)

    def forward(self, inputs: Tensor) -> object:
        """What the moved model answers."""
        return At(self.inner, self.flat())(inputs)


cnn_of_seeds, lstm_of_seeds = changed(cnn_bn, OfSeeds), changed(lstm, OfSeeds)  # need model.trainable = "coefficients"


@dataclass(frozen=True)
class ZerothOrder:
    """Local training by differences of two losses, a slot of `LocalClient`.

    Attributes:
        eps: size of the perturbation, above 0.
        steps: of a round.
    """

    eps: float
    steps: int

    def __post_init__(self) -> None:
        if not self.eps > 0 or self.steps < 1:
            raise UserError(f"client: eps = {self.eps} must be above 0, zo_steps = {self.steps} at least 1")

    def __call__(self, training: Trains, task: Task, ctx: ClientContext, loss: Loss) -> Metrics:
        assert isinstance(ctx.model, OfSeeds)  # `SeedClient.require`
        assert isinstance(training, Training)  # `client` below
        ctx.model.train()
        total, seen, numbers = 0.0, 0, ctx.model.coefficients.data
        with torch.no_grad():
            flat = ctx.model.flat()
            along = directions(len(numbers), len(flat)).to(flat.device)
            for _, batch in zip(range(self.steps), endless(ctx.data, training, len(ctx.data), ctx.rng), strict=False):
                seed = int(torch.randint(len(numbers), (), generator=ctx.rng))
                both = (flat + sign * self.eps * along[seed] for sign in (1, -1))
                up, down = (float(loss(At(ctx.model.inner, moved), batch)) for moved in both)
                step = -training.lr * (up - down) / (2 * self.eps)
                numbers[seed] += step
                flat.add_(along[seed], alpha=step)
                total, seen = total + (up + down) / 2, seen + len(batch[1])
        check_converged(total / self.steps, self.steps, training.lr)
        return {"loss": total / self.steps, "steps": self.steps, "examples": seen}


@dataclass(frozen=True)
class SeedClient:
    """A client whose model has nothing but coefficients to train."""

    inner: Client

    def require(self, model: nn.Module, image: Tensor) -> None:
        """Complain of another model, or of one that trains more. Raises UserError."""
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        if not isinstance(model, OfSeeds) or trained != [NAME]:
            raise UserError(
                f"client: needed: model.name = '{__name__}:cnn_of_seeds' or '{__name__}:lstm_of_seeds', and "
                f"model.trainable = 'coefficients'; trained are {', '.join(trained[:3])}"
            )

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        """Train and send the coefficients."""
        return self.inner(task, ctx)


def client(*, training: Training, eps: float = 1e-3, zo_steps: int = 30) -> Client:
    """FedKSeed's client; `training.lr` and `training.batch_size` count.

    Args:
        training: the config's `[training]` table.
        eps: size of the perturbation, above 0.
        zo_steps: zeroth-order steps in a round.
    """
    return SeedClient(LocalClient(training, fit=ZerothOrder(eps, zo_steps)))
