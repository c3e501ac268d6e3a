"""Clients that correct local training for the drift between clients: SCAFFOLD, FedDyn; and what FedNova and q-FedAvg report.

    LocalClient(training, loss=ControlVariate(2).loss, report=ControlVariate(2).report, extra=CONTROL)

A correction is a linear term of the loss, so that its gradient is added to every step of whatever optimizer trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clients.local import Finish, also_trained, fit_all, weighing
from fl_sim.communication.extra import Extra, Fixed, parameters
from fl_sim.core.types import Metrics, Params, Task, UserError
from fl_sim.data.weights import Batch
from fl_sim.training.client import ClientContext
from fl_sim.training.evaluation import evaluate
from fl_sim.training.gradients import mean_gradient
from fl_sim.training.loop import Training, Trains
from fl_sim.training.losses import Loss, Proximal, weighs

CONTROL = Extra(down={"control": parameters}, up={"control": parameters})
ALPHA = Extra(down={"alpha": Fixed({"alpha": (1,)})})
STEPS = Extra(up={"steps": Fixed({"steps": (1,)})})
LOSS = Extra(up={"loss": Fixed({"loss": (1,)})})


@dataclass(frozen=True, eq=False)
class Tilted:
    """`loss + <tilt, w>`: adds `tilt` to the gradient of every step.

    Attributes:
        tilt: parameter name -> tensor of its shape.
        loss: the loss that the term is added to.
    """

    tilt: Params = field(repr=False)
    loss: Loss

    @property
    def weighs(self) -> bool:
        """Whether the loss that the term is added to uses weights of samples."""
        return weighs(self.loss)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        value = self.loss(model, batch)
        for name, parameter in model.named_parameters():
            if name in self.tilt:
                value = value + (self.tilt[name].to(parameter.device) * parameter).sum()
        return value


def kept(ctx: ClientContext, prefix: str, like: Mapping[str, Tensor]) -> Params:
    """A vector that this client keeps between its rounds, by parameter name; zero before the first."""
    return {name: ctx.state.get(f"{prefix}.{name}", torch.zeros_like(value)) for name, value in like.items()}


def keep(ctx: ClientContext, prefix: str, tensors: Params) -> None:
    """Keep a vector for this client's next round."""
    ctx.state.update({f"{prefix}.{name}": value for name, value in tensors.items()})


def require_plain(training: Training, method: str, *, momentum: bool = False) -> None:
    """Check that local training is SGD with one learning rate, whose steps a formula of the method counts.

    Raises:
        UserError: names the option of `[training]`.
    """
    wanted = {"optimizer": "sgd", "schedule": "constant", "nesterov": False, "clip_norm": None}
    for key, value in (wanted if momentum else {**wanted, "momentum": 0.0}).items():
        if (found := getattr(training, key)) != value:
            needed = "no clipping" if value is None else f"{value!r}"
            raise UserError(
                f"{method}: training.{key} = {found!r}: its formula divides by lr x steps; needed: {needed}"
            )


def full_gradient(model: nn.Module, ctx: ClientContext, names: Mapping[str, Tensor]) -> Params:
    """Gradient of the task's mean loss over all samples of the client, by parameter name; the model stays as it is."""
    zero: Params = {name: torch.zeros_like(value) for name, value in names.items()}
    return zero | mean_gradient(model, ctx.data, ctx.loss, names)


@dataclass(frozen=True)
class ControlVariate:
    """The client of SCAFFOLD (Karimireddy et al., 2020, algorithm 1): each step takes `g - c_i + c` for the gradient g.

    Attributes:
        training: local SGD, whose learning rate of the round option II divides by.
        option: equation 4: I, c_i is the gradient of the client's loss at the received model; II, the mean gradient of the
            local steps, `c_i - c + (x - y_i) / (K lr)`.
    """

    training: Training
    option: int = 2

    @weighing
    def loss(self, task: Task, ctx: ClientContext) -> Loss:
        """The task's loss, tilted by `c - c_i`."""
        common = task.extra["control"]
        own = kept(ctx, "control", common)
        return Tilted({name: value - own[name] for name, value in common.items()}, ctx.loss)

    def fit(self, training: Trains, task: Task, ctx: ClientContext, loss: Loss) -> Metrics:
        """Train; the pass of option I over all samples, made in `report`, counts as trained on: it has backward passes."""
        metrics = fit_all(training, task, ctx, loss)
        return also_trained(metrics, ctx, len(ctx.data)) if self.option == 1 else metrics

    def report(self, task: Task, ctx: ClientContext) -> Finish:
        """Send the change of c_i."""
        common = task.extra["control"]
        own = kept(ctx, "control", common)
        gradient = full_gradient(ctx.model, ctx, common) if self.option == 1 else None

        def finish(params: Params, metrics: Metrics) -> Mapping[str, Params]:
            new = gradient
            if new is None:
                scale = 1 / (metrics["steps"] * self.training.at(task.round).lr)
                new = {n: own[n] - c + scale * (task.params[n] - params[n]) for n, c in common.items()}
            keep(ctx, "control", new)
            return {"control": {name: value - own[name] for name, value in new.items()}}

        return finish


class DynamicRegulariser:
    """The client of FedDyn (Acar et al., 2021, algorithm 1, equation 1), whose alpha the server sends.

    It minimises `L(w) - <g, w> + alpha/2 ||w - w_received||^2` and keeps `g <- g - alpha (w - w_received)`, its gradient at
    the minimum.
    """

    @weighing
    def loss(self, task: Task, ctx: ClientContext) -> Loss:
        """The task's loss with both terms."""
        named = dict(ctx.model.named_parameters())
        anchor = {name: value.detach().clone() for name, value in named.items()}
        own = kept(ctx, "gradient", {name: v for name, v in task.params.items() if name in named})
        alpha = float(task.extra["alpha"]["alpha"])
        return Tilted({name: -value for name, value in own.items()}, Proximal(alpha, anchor, ctx.loss))

    def report(self, task: Task, ctx: ClientContext) -> Finish:
        """Send nothing; keep the gradient."""
        named = dict(ctx.model.named_parameters())
        own = kept(ctx, "gradient", {name: v for name, v in task.params.items() if name in named})
        alpha = float(task.extra["alpha"]["alpha"])

        def finish(params: Params, metrics: Metrics) -> Mapping[str, Params]:
            keep(ctx, "gradient", {n: g - alpha * (params[n] - task.params[n]) for n, g in own.items()})
            return {}

        return finish


@dataclass(frozen=True)
class EffectiveSteps:
    """What a FedNova client reports: the norm `||a||_1` of its local steps (Wang et al., 2020, section 4.1).

    Attributes:
        momentum: of the local SGD; `a_j = (1 - momentum^(steps - j)) / (1 - momentum)`, 1 without momentum.
    """

    momentum: float = 0.0

    def __call__(self, task: Task, ctx: ClientContext) -> Finish:
        def finish(params: Params, metrics: Metrics) -> Mapping[str, Params]:
            norm = last = 0.0
            for _ in range(int(metrics["steps"])):
                last = self.momentum * last + 1  # the closed form of a_j has no value at a momentum of 1
                norm += last
            return {"steps": {"steps": torch.tensor([norm], dtype=torch.float32)}}

        return finish


def received_loss(task: Task, ctx: ClientContext) -> Finish:
    """What a q-FedAvg client reports: the mean loss of the received model on its samples (Li et al., 2020, algorithm 2)."""
    found = evaluate(ctx.model, ctx.data.augmented(None), ctx.loss)["loss"]
    return lambda params, metrics: {"loss": {"loss": torch.tensor([found], dtype=torch.float32)}}
