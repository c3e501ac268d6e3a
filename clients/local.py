"""The one client: load, train, choose what to upload. Methods fill its slots.

client = LocalClient(training=Training(lr=0.1, epochs=2), upload=TopK(0.1))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fl_sim.losses import Loss, Proximal, cross_entropy
from fl_sim.models import prunable_names
from fl_sim.sparsity import global_topk, magnitude, topk_mask
from fl_sim.training import Training, load, snapshot
from fl_sim.types import ClientContext, Mask, Params, Task, Update
from fl_sim.wire import RESIDUAL

OWN = "loss."
"""Prefix of a client's kept tensors that belong to its loss, for instance projections."""
LossFor = Callable[[Task, ClientContext], Loss]
"""(task, context whose model holds the received parameters) -> the loss of this round."""
Upload = Callable[[Task, Params], Mask | None]
"""(task, prunable parameters after training) -> the coordinates of them to send; None sends all."""


def plain(task: Task, ctx: ClientContext) -> Loss:
    """Cross-entropy, whatever the task."""
    return cross_entropy


@dataclass(frozen=True)
class ProximalLoss:
    """Cross-entropy plus mu/2 ||w - w_global||^2 (FedProx; Li et al., 2020, equation 2)."""

    mu: float

    def __call__(self, task: Task, ctx: ClientContext) -> Loss:
        return Proximal(self.mu, {name: p.detach().clone() for name, p in ctx.model.named_parameters()})


def everything(task: Task, params: Params) -> Mask | None:
    """Send what is alive under the global mask; all of it while there is none."""
    return task.mask


@dataclass(frozen=True)
class TopK:
    """Send the `density` share of prunable coordinates that changed most, chosen over all layers at once.

    Top-k sparsification (Aji and Heafield, 2017; Stich et al., 2018), on the change of a round instead of one gradient.
    What a global mask has pruned does not change, so it is never chosen before what has.
    """

    density: float

    def __call__(self, task: Task, params: Params) -> Mask | None:
        change = magnitude({name: value - task.params[name] for name, value in params.items()})
        return topk_mask(change, global_topk(change, self.density))


def _own(loss: Loss, state: Params) -> Params:
    """Parameters of a loss that is a module, as they were kept in `state`. They never travel: no model contains them."""
    own = {OWN + name: value for name, value in loss.state_dict().items()} if isinstance(loss, nn.Module) else {}
    for name in own.keys() & state.keys():
        own[name].copy_(state[name])
    return own


@dataclass(frozen=True)
class LocalClient:
    """Local training with slots.

    Attributes:
        training: hyper-parameters of the one training loop.
        loss: the loss of a round; one that is a module keeps its parameters in the client's state, and trains them.
        upload: which coordinates travel.
    """

    training: Training
    loss: LossFor = plain
    upload: Upload = everything

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        model = load(ctx.model, task.params)
        loss = self.loss(task, ctx)
        own = _own(loss, ctx.state)
        metrics = self.training.fit(model, ctx.data, loss, mask=task.mask, rng=ctx.rng)
        ctx.state.update(own)
        params = snapshot(model)
        prunable = {name: params[name] for name in prunable_names(model)}
        for name, value in prunable.items():
            # Error feedback (Seide et al., 2014): what earlier uploads left out is offered again.
            if (residual := ctx.state.get(RESIDUAL + name)) is not None:
                value += residual
        return Update(params, ctx.num_examples, self.upload(task, prunable), metrics)
