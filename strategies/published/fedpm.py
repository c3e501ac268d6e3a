"""FedPM (Isik et al., 2023, arXiv 2209.15328): random weights stay; clients train and send a binary mask over them.

theta = sigmoid(scores), m ~ Bernoulli(theta), weights are w_init * m, trained through the mask (straight-through). A client sends
a mask drawn from its theta, at most one bit for each weight. The server's theta is the mean of the masks (the Bayesian
aggregation with its prior reset in every round), and its scores travel down as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clients.local import LocalClient
from fl_sim.core.seeding import derive
from fl_sim.core.types import Params, Task, Update, UserError
from fl_sim.models import prunable_names
from fl_sim.models.interface import changed
from fl_sim.models.reparametrized import Reparametrized, compute
from fl_sim.models.sequence import lstm
from fl_sim.models.simple import cnn_bn
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training
from strategies.base import Method
from strategies.server_step import ServerState

SENT = 43
"""Last element of the key from which a client draws the mask that it sends."""
EDGE = 0.02
"""Least distance of theta from 0 and 1 on the server, so that scores stay finite and a weight can come back."""
ENDING = ".0.score"


class RandomWeight(Reparametrized):
    """A frozen weight of size c = sqrt(2 / fan-in) and random sign, times a mask of probability sigmoid(score).

    Training draws the mask at every forward pass; evaluation has the weights of a probability above 0.5.
    """

    sparse = ("score",)

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.size = math.sqrt(2 / weight[0].numel())
        self.score = nn.Parameter(torch.logit(torch.empty_like(weight).uniform_(EDGE, 1 - EDGE)))

    def forward(self, weight: Tensor) -> Tensor:
        theta = torch.sigmoid(self.score)
        hard = torch.bernoulli(theta) if self.training else (theta > 0.5).to(theta.dtype)
        return self.size * torch.sign(weight) * (theta + (hard - theta).detach())


def masked(model: nn.Module) -> nn.Module:
    """The model with a trained mask over each weight matrix; needs `model.trainable = "*.score"`."""
    for name in prunable_names(model):
        path, _, attribute = name.rpartition(".")
        compute(model.get_submodule(path), attribute, RandomWeight(model.get_parameter(name).detach()))
    return model


masked_cnn, masked_lstm = changed(cnn_bn, masked), changed(lstm, masked)


@dataclass(frozen=True)
class SendMask:
    """A client that draws a mask from what it trained and sends it as -1 and 1, which int2 holds exactly."""

    inner: Client

    def require(self, model: nn.Module, image: Tensor) -> None:
        """Complain of a model without scores that are trained. Raises UserError."""
        if not [name for name, value in model.named_parameters() if name.endswith(ENDING) and value.requires_grad]:
            raise UserError(
                "client: no score of a mask is trained; needed: model.name = 'strategies.published.fedpm:masked_cnn' and "
                "model.trainable = '*.score'"
            )

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        """Train the scores, and send a mask."""
        update = self.inner(task, ctx)
        rng = torch.Generator().manual_seed(derive(ctx.seed, SENT))
        params = dict(update.params)
        for name, value in update.params.items():
            if name.endswith(ENDING):
                params[name] = 2 * torch.bernoulli(torch.sigmoid(value.cpu()), generator=rng) - 1
        return replace(update, params=params)


def client(*, training: Training) -> Client:
    """FedPM's client; goes with `wire.uplink.values = "int2"`.

    Args:
        training: the config's `[training]` table.
    """
    return SendMask(LocalClient(training))


def scores(state: ServerState, aggregated: Params) -> tuple[Params, Params]:
    """Server step: the mean of masks of -1 and 1 is 2 theta - 1; what is kept and sent is logit(theta)."""
    back: Callable[[Tensor], Tensor] = lambda mean: torch.logit(((1 + mean) / 2).clamp(EDGE, 1 - EDGE))  # noqa: E731
    return {name: back(value) if name.endswith(ENDING) else value for name, value in aggregated.items()}, {}


def server() -> Method:
    """FedPM's server. Goes with `strategies.published.fedpm:client`."""
    return Method(optimise=scores)
