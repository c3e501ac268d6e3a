"""SparsyFed (Guastella et al., 2025, arXiv 2504.05153): weights re-parametrised by powers, and sparse after every local training.

A client trains phi with w = phi |phi|^(beta - 1) (Powerpropagation; Schwarz et al., 2021), which moves large weights more and
small ones less. After training it keeps the `density` share of the weights with the largest magnitude, and sends what changed:
the weights that it kept, and zeros in the place of those that it received and did not keep. The server adds the mean change of
all clients (`strategy.aggregate = "zero_fill"`); its model is as dense as the union of their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from clients.local import LocalClient, require_share
from clients.transformed import Through, Transform
from fl_sim.core.types import Params, Task, Update, UserError
from fl_sim.models import prunable_names
from fl_sim.sparsity import apply_mask, global_topk, magnitude, topk_mask
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training


def power(value: Tensor, exponent: float) -> Tensor:
    """sign(v) |v|^exponent of each value."""
    return value.sign() * value.abs() ** exponent


@dataclass(frozen=True)
class SparsyClient:
    """A client that trains powers, and sends the largest weights.

    Attributes:
        training: the config's `[training]` table. density: share of the weights that is kept.
        beta: exponent, at least 1; 1 trains the weights themselves.
    """

    training: Training
    density: float
    beta: float

    def __post_init__(self) -> None:
        require_share(self.density)
        if not self.beta >= 1:
            raise UserError(f"client.beta = {self.beta}: must be at least 1")

    def powers(self, task: Task, ctx: ClientContext) -> Transform:
        """The weights of a forward pass."""
        return lambda params: {name: power(value, self.beta) for name, value in params.items()}

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        """Train from the received weights, and choose what to send."""
        received: Params = {name: task.params[name] for name in prunable_names(ctx.model) if name in task.params}
        start = {**task.params, **{name: power(value, 1 / self.beta) for name, value in received.items()}}
        update = LocalClient(self.training, loss=Through(self.powers))(replace(task, params=start), ctx)
        weights = {name: power(update.params[name], self.beta) for name in received}
        scores = magnitude(weights)
        kept = topk_mask(scores, global_topk(scores, self.density))
        sent = {name: kept[name] | (value != 0) for name, value in received.items()}
        return replace(update, params={**update.params, **apply_mask(weights, kept)}, mask=sent)


def client(*, training: Training, density: float = 0.05, beta: float = 1.25) -> Client:
    """SparsyFed's client. Goes with `strategy.aggregate = "zero_fill"`.

    Args:
        training: the config's `[training]` table.
        density: share of the prunable weights that is kept, from 0 to 1.
        beta: exponent of the re-parametrisation, at least 1.
    """
    return SparsyClient(training, density, beta)
