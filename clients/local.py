"""The one client: load, train, choose what to upload. Methods fill its slots.

client = LocalClient(training=Training(lr=0.1, epochs=2), upload=TopK(0.1))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from fl_sim.communication.extra import NO_EXTRA, Extra
from fl_sim.core.types import Mask, Metrics, Params, Task, Update, UserError
from fl_sim.models import prunable_names
from fl_sim.models.parameters import load, snapshot
from fl_sim.sparsity import global_topk_mask, intersect, magnitude
from fl_sim.sparsity.selection import top_of_rows
from fl_sim.training.client import ANYTHING, Client, ClientContext
from fl_sim.training.loop import Training, Trains
from fl_sim.training.losses import CrossEntropy, Loss, Proximal, weighs

OWN = "loss."
"""Prefix of a client's kept tensors that belong to its loss, for instance projections."""


Marked = TypeVar("Marked", bound=Callable[..., Loss])
LossFor = Callable[[Task, ClientContext], Loss]
"""(task, context whose model holds the received parameters) -> the loss of this round."""
Upload = Callable[[Task, Params], Mask | None]
"""(task, prunable parameters after training, corrected by error feedback) -> upload mask, the coordinates to send; None
sends all."""
Setting = Callable[[Task, ClientContext], AbstractContextManager[None]]
"""(task, context) -> context manager that is active during local training, for instance to set the gates' keep ratio."""
Retain = Callable[[Task, ClientContext], Mask | None]
"""(task, context after training) -> retained mask by parameter name. False: the coordinate is reset to the received value
and not uploaded. Parameters without an entry are retained; None retains all."""
Finish = Callable[[Params, Metrics], Mapping[str, Params]]
"""(parameters after training, metrics of the training) -> the update's extra tensors."""
Report = Callable[[Task, ClientContext], Finish]
"""(task, context whose model holds the received parameters) -> what follows the training: keeps what the client needs in its
next round in `ctx.state`, and gives the extra tensors to send."""

Fit = Callable[[Trains, Task, ClientContext, Loss], Metrics]
"""(training, task, context whose model holds the received parameters, loss) -> metrics of the training, which it does."""
Personalise = Callable[[Task, ClientContext], None]
"""(task, context whose model holds the received parameters and what the client keeps) -> makes the model the one that the
client would use, in place, before it is evaluated."""


@runtime_checkable
class Alike(Protocol):
    """A setting that may be the same for all clients of a round."""

    @property
    def alike(self) -> bool:
        """Whether it is: it depends on the round alone, and draws nothing."""


@runtime_checkable
class NeedsModel(Protocol):
    """A loss or a training that only some models allow."""

    def require(self, model: nn.Module, image: torch.Tensor) -> None:
        """Raise UserError unless it can be computed on this model, for an image (1, C, H, W)."""


def weighing(loss_for: Marked) -> Marked:
    """Say that the losses of a `LossFor` use the weights of samples (`data.weight`, `data.class_weights`)."""
    loss_for.weighs = True  # type: ignore[attr-defined]
    return loss_for


@weighing
def task_loss(task: Task, ctx: ClientContext) -> Loss:
    """The loss of the config's `task`: cross-entropy of a classification."""
    return ctx.loss


task_loss.reads_outputs_alone = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Always:
    """Use the same loss for every task."""

    loss: Loss
    reads_outputs_alone: ClassVar[bool] = True

    @property
    def weighs(self) -> bool:
        """Whether the loss uses the weights of samples."""
        return weighs(self.loss)

    @property
    def class_scores(self) -> bool:
        """Whether outputs must be scores of classes."""
        return isinstance(self.loss, CrossEntropy)

    def __call__(self, task: Task, ctx: ClientContext) -> Loss:
        return self.loss


def no_setting(task: Task, ctx: ClientContext) -> AbstractContextManager[None]:
    """Leave the model as it is during training."""
    return nullcontext()


def fit_all(training: Trains, task: Task, ctx: ClientContext, loss: Loss) -> Metrics:
    """Train everything that is trained together."""
    return training.fit(ctx.model, ctx.data, loss, mask=task.mask, rng=ctx.rng)


def also_trained(metrics: Metrics, ctx: ClientContext, samples: float) -> Metrics:
    """Metrics of a training beside which the client trained on further samples: their `examples`, by which the virtual clock
    goes, count those too. Loss and steps stay those of what the server aggregates."""
    return {**metrics, "examples": metrics.get("examples", len(ctx.data)) + samples}


def no_report(task: Task, ctx: ClientContext) -> Finish:
    """Keep and send nothing more."""
    return lambda params, metrics: {}


def retain_all(task: Task, ctx: ClientContext) -> Mask | None:
    """Retain everything."""
    return None


@dataclass(frozen=True)
class ProximalLoss:
    """The task's loss plus mu/2 ||w - w_global||^2 (FedProx; Li et al., 2020, equation 2)."""

    mu: float
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise UserError(f"client.mu = {self.mu}: must not be negative")

    def __call__(self, task: Task, ctx: ClientContext) -> Loss:
        return Proximal(self.mu, {name: p.detach().clone() for name, p in ctx.model.named_parameters()}, ctx.loss)


def require_share(density: float) -> None:
    """Raises UserError where `client.density` is no share."""
    if not 0 <= density <= 1:
        raise UserError(f"client.density = {density}: must be from 0 to 1")


def upload_all(task: Task, params: Params) -> Mask | None:
    """Send what is alive under the global mask; all of it while there is none."""
    return task.mask


@dataclass(frozen=True)
class TopK:
    """Send the `density` share of prunable coordinates that changed most, chosen over all layers at once.

    Top-k sparsification (Aji and Heafield, 2017; Stich et al., 2018), on the change of a round instead of one gradient.
    What a global mask has pruned does not change, so it is never chosen before what has.
    """

    density: float

    def __post_init__(self) -> None:
        require_share(self.density)

    def __call__(self, task: Task, params: Params) -> Mask | None:
        change = magnitude({name: value - task.params[name] for name, value in params.items()})
        return global_topk_mask(change, self.density)

    def of_rows(self, received: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """The masks of several clients that received the same: their prunable parameters are rows; None = one by one."""
        return top_of_rows((rows - received).abs_(), round(self.density * rows.shape[1]))


def _restore(params: Params, received: Params, retained_mask: Mask) -> None:
    """Reset, in place, the coordinates where the retained mask is False to the received values."""
    for name, kept in retained_mask.items():
        torch.where(kept, params[name], received[name], out=params[name])


def _within(upload_mask: Mask | None, retained_mask: Mask, prunable: Params) -> Mask:
    """Intersect an upload mask (None: all) with the retained coordinates of the prunable parameters."""
    whole = {name: torch.ones_like(value, dtype=torch.bool) for name, value in prunable.items()}
    mine = whole | {name: kept for name, kept in retained_mask.items() if name in prunable}
    return mine if upload_mask is None else intersect(mine, whole | upload_mask)


def _own(loss: Loss, state: Params) -> Params:
    """Parameters of a loss that is a module, as they were kept in `state`. They never travel: no model contains them."""
    own = {OWN + name: value for name, value in loss.state_dict().items()} if isinstance(loss, nn.Module) else {}
    for name in own.keys() & state.keys():
        own[name].copy_(state[name])
    return own


@dataclass(frozen=True)
class LocalClient:
    """Client that loads the global model, trains on its data and uploads a masked update; each step is a slot.

    Attributes:
        training: hyper-parameters of the one training loop, or a loop around it.
        loss: the loss of a round; one that is a module keeps its parameters in the client's state, and trains them.
        setting: context manager that is active during local training.
        retain: chooses the retained mask.
        upload: chooses the upload mask.
        fit: trains, in one step or in several.
        before_evaluation: makes a received model the client's own before the client evaluates it; None = it is.
        keeps: what a client of this method must keep for itself, or must not (`fl_sim.training.client.KEEPS`).


        report: keeps and sends what a method needs beside the parameters.
        extra: declares the extra tensors that tasks and updates carry.
    """

    training: Trains
    loss: LossFor = task_loss
    setting: Setting = no_setting
    retain: Retain = retain_all
    upload: Upload = upload_all
    fit: Fit = fit_all
    before_evaluation: Personalise | None = None
    keeps: str = ANYTHING

    def __post_init__(self) -> None:
        if getattr(self.training, "cut_channels", False) and not getattr(self.loss, "reads_outputs_alone", False):
            raise UserError(
                "training.cut_channels: the loss of this client compares weights or layers with those of the whole model; "
                "allowed: losses of the outputs alone, as in fedavg, adaptive_pruning, distillation"
            )

    report: Report = no_report
    extra: Extra = NO_EXTRA

    def plain_training(self) -> Training | None:
        """The hyper-parameters where training is SGD on the task's loss in a setting that all clients of a round share, and
        nothing else: several clients can do that as one."""
        shared = self.setting is no_setting or (isinstance(self.setting, Alike) and self.setting.alike)
        cuts = getattr(self.training, "cut_channels", False)
        plain = self.loss is task_loss and self.fit is fit_all and shared and not cuts
        return self.training if plain and isinstance(self.training, Training) else None

    @property
    def sends_all(self) -> bool:
        """Whether uploads carry whole tensors while there is no pruning mask."""
        return self.upload is upload_all and self.retain is retain_all

    @property
    def class_scores(self) -> bool:
        """Whether the loss needs a model that answers scores of one class each."""
        return bool(getattr(self.loss, "class_scores", False))

    @property
    def token_scores(self) -> bool:
        """Whether a loss of scores of classes takes those of tokens too."""
        return bool(getattr(self.loss, "token_scores", False))

    @property
    def weighs(self) -> bool:
        """Whether the loss uses the weights of samples."""
        return weighs(self.loss)

    def require(self, model: nn.Module, image: torch.Tensor) -> None:
        """Complain of a model that the loss or the training is not for, before anything is trained. Raises UserError."""
        for part in (self.loss, self.training):
            if isinstance(part, NeedsModel):
                part.require(model, image)

    def trained_by(self, trains: Trains) -> Client:
        """Copy of the client with another training."""
        return replace(self, training=trains)

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        model = load(ctx.model, task.params)
        loss = self.loss(task, ctx)
        own = _own(loss, ctx.state)
        finish = self.report(task, ctx)
        with self.setting(task, ctx):
            metrics = self.fit(self.training.at(task.round), task, ctx, loss)
        ctx.state.update(own)
        params = snapshot(model, task.params)
        extra = finish(params, metrics)
        return self._update(task, ctx, params, metrics, prunable_names(model), extra)

    @property
    def reads_parameters_alone(self) -> bool:
        """Whether all that follows the training looks at the trained parameters, and neither at the model nor at data or state.

        What a user wrote may look at anything.
        """
        shipped = self.upload is upload_all or type(self.upload) is TopK
        own = type(self).__call__ is LocalClient.__call__
        return own and shipped and self.retain is retain_all and self.report is no_report

    def upload_masks(self, received: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """The upload masks of several clients, bool (clients, prunable values), for `update_of`; None = each chooses by itself.

        Args:
            received: the prunable parameters that all of them received, 1-D.
            rows: those after training, corrected by error feedback.
        """
        return self.upload.of_rows(received, rows) if type(self.upload) is TopK else None

    def update_of(
        self,
        task: Task,
        ctx: ClientContext,
        params: Params,
        metrics: Metrics,
        prunable: Sequence[str],
        chosen: Mask | None = None,
    ) -> Update:
        """The update of a client that was trained elsewhere, as `__call__` makes it; for clients that read the parameters alone.

        `ctx.model` is not asked for. `chosen` is the client's upload mask, where `upload_masks` has made it.
        """
        if chosen is not None:
            return Update(params, ctx.num_examples, chosen, metrics)
        return self._update(task, ctx, params, metrics, prunable, {})

    def _update(
        self,
        task: Task,
        ctx: ClientContext,
        params: Params,
        metrics: Metrics,
        prunable_names: Iterable[str],
        extra: Mapping[str, Params],
    ) -> Update:
        """What a client of these parameters uploads."""
        if self.upload is upload_all and self.retain is retain_all:
            return Update(params, ctx.num_examples, task.mask, metrics, extra)
        prunable = {name: params[name] for name in prunable_names if name in params}
        # With error feedback, what earlier uploads left out competes with what this round learnt.
        candidates = ctx.corrected(prunable)
        retained_mask = self.retain(task, ctx)
        if retained_mask is None:
            return Update(params, ctx.num_examples, self.upload(task, candidates), metrics, extra)
        _restore(params, task.params, retained_mask)
        _restore(candidates, task.params, {name: kept for name, kept in retained_mask.items() if name in candidates})
        upload_mask = _within(self.upload(task, candidates), retained_mask, prunable)
        return Update(params, ctx.num_examples, upload_mask, metrics, extra)
