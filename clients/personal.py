"""Personalised clients: what a client does for a model of its own, beside what it does for the global one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clients.local import LocalClient, also_trained
from fl_sim.core.types import Metrics, Task, Update, UserError
from fl_sim.models.parameters import load, snapshot
from fl_sim.training.client import NOTHING, Around, ClientContext
from fl_sim.training.loop import Training, Trains
from fl_sim.training.losses import Loss, Proximal

OWN = "personal."
"""Prefix of a client's kept tensors that are its personal model."""


@dataclass(frozen=True)
class HeadFirst:
    """Train what the client keeps with the shared parts fixed, then the shared parts with what it keeps fixed.

    FedRep (Collins et al., 2021, arXiv 2102.07078, algorithm 1): the head by `head`, then the representation by `body`.
    """

    head: Training
    body: Training

    def __call__(self, training: Trains, task: Task, ctx: ClientContext, loss: Loss) -> Metrics:
        trained = [name for name, p in ctx.model.named_parameters() if p.requires_grad]
        own = [name for name in trained if name in ctx.personal]
        shared = [name for name in trained if name not in ctx.personal]
        head, body = self.head.at(task.round), self.body.at(task.round)
        before = head.fit(ctx.model, ctx.data, loss, mask=task.mask, rng=ctx.rng, trainable=own)
        metrics = body.fit(ctx.model, ctx.data, loss, mask=task.mask, rng=ctx.rng, trainable=shared)
        return also_trained(metrics, ctx, before["examples"])


@dataclass(frozen=True)
class FineTune:
    """Train a received model on the client's own samples; what comes of it is measured, and neither kept nor sent."""

    training: Training

    def __call__(self, task: Task, ctx: ClientContext) -> None:
        self.training.at(task.round).fit(ctx.model, ctx.data, ctx.loss, mask=task.mask, rng=ctx.rng)


@dataclass(frozen=True)
class Ditto(Around):
    """Train the global model as `client` does, and beside it a personal model that is pulled to the received one.

    Ditto (Li et al., 2021, arXiv 2012.04221, equation 1 and algorithm 1): v <- v - lr (grad F(v) + mu (v - w)), where w is
    the received model. v is kept in `ctx.state`, is what the client evaluates, and never travels. A client's first v is the
    model that it receives first; the paper starts all of them from the initial model.

    Attributes:
        client: trains and sends the global model; what it sends does not depend on v.
        personal: training of v, in a round.
        mu: strength of the pull (lambda in the paper), at least 0; 0 trains v on the client's data alone.
    """

    client: LocalClient
    personal: Training
    mu: float
    keeps = NOTHING

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise UserError(f"client.mu = {self.mu}: must not be negative")

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        update = self.client(task, ctx)
        self.before_evaluation(task, ctx)
        pulled = Proximal(self.mu, task.params, ctx.loss)
        personal = self.personal.at(task.round).fit(ctx.model, ctx.data, pulled, mask=task.mask, rng=ctx.rng)
        ctx.state.update({OWN + name: value for name, value in snapshot(ctx.model, task.params).items()})
        load(ctx.model, update.params)  # what is measured of a trained model is measured of the one that is sent
        return replace(update, metrics=also_trained(update.metrics, ctx, personal["examples"]))

    def before_evaluation(self, task: Task, ctx: ClientContext) -> None:
        """Put v into the model; w where the client has not trained yet."""
        load(ctx.model, {name: ctx.state.get(OWN + name, value) for name, value in task.params.items()})
