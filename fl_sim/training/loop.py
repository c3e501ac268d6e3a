"""The one training loop: hyper-parameters, and the steps of a client.

model = load(ctx.model, task.params)
metrics = local_sgd(model, ctx.data, lr=0.1, epochs=2, mask=task.mask, rng=ctx.rng)
params = snapshot(model)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fl_sim.core.types import Mask, Metrics, UserError
from fl_sim.data import Split
from fl_sim.data.weights import Batch, parts_of, weights_of
from fl_sim.gating.cutting import submodel
from fl_sim.training.losses import Loss, cross_entropy, weighs
from fl_sim.training.optimizers import SGD, AdamW, Optimizer
from fl_sim.training.passes import refuses_batch_of_one, samples_of_a_pass
from fl_sim.training.precision import PRECISIONS
from fl_sim.training.preparation import dropout_from, projection, trained_alone
from fl_sim.training.rates import DECAYS, rate_over_rounds

Schedule = Callable[[float], float]
"""Progress through this call's steps, 0..1 -> factor of the learning rate."""


def _constant(progress: float) -> float:
    """The learning rate stays."""
    return 1.0


def _cosine(progress: float) -> float:
    """Down along half a cosine, within one client's training."""
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: Mapping[str, Schedule] = {"constant": _constant, "cosine": _cosine}


Clip = Callable[[list[nn.Parameter], list[nn.Parameter], float], object]
"""(the model's parameters, the loss's own, largest norm): scales gradients in place."""
CLIPS: Mapping[str, Clip] = {
    "union": lambda model, loss, norm: nn.utils.clip_grad_norm_([*model, *loss], norm),
    # What the published code of arXiv 2605.31191 did at first: its projections' gradients were never scaled.
    "model": lambda model, loss, norm: nn.utils.clip_grad_norm_(model, norm),
}


class TrainingDiverged(RuntimeError):
    """Training whose loss became NaN or infinite."""


class Trains(Protocol):
    """Protocol of local training: `Training`, or a stand-in for it."""

    def fit(
        self, model: nn.Module, data: Split, loss: Loss, *, mask: Mask | None, rng: torch.Generator | None
    ) -> Metrics:
        """Train `model` in place on `data` under a pruning mask; returns metrics, among them `loss`."""

    def at(self, number: int) -> Trains:
        """The training of round `number`, from 1."""


LARGEST = torch.finfo(torch.float32).max
"""What an optimiser computes with."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Hyper-parameters of local training.

    Attributes:
        lr: learning rate of the clients' optimizer, above 0.
        epochs: passes over the client's data in a round; refused beside `steps`.
        steps: optimizer steps in a round, instead of epochs; unset = epochs.
        batch_size: samples per batch; the last batch of an epoch may be smaller.
        drop_last: whether a smaller last batch of an epoch is left out; a client with fewer samples than one batch keeps it.
        accumulate: batches whose gradients make one optimizer step, each sample with the same weight: the step of a batch
            that is so many times larger, in the memory of a small one.
        optimizer: "sgd" or "adamw".
        momentum: momentum of SGD, at least 0.
        nesterov: Nesterov momentum of SGD; needs momentum above 0.
        weight_decay: L2 penalty (SGD) or decoupled weight decay (AdamW), at least 0.
        schedule: learning rate within one client's training of a round: "constant", or "cosine" from `lr` to 0.
        warmup: rounds at the start with a lower learning rate: round r of them has r / (warmup + 1) of it.
        decay: learning rate over rounds, after the warm-up: "constant", or down to `decay_to` of it, "linear", "cubic" (fast at
            first; Zhu and Gupta, 2017), "exponential" (by the same factor each round) or "cosine".
        decay_to: last learning rate as a share of `lr`, above 0 and at most 1.
        decay_end: first round at the last learning rate; unset = the last round.
        clip_norm: largest L2 norm of the gradient, above 0; unset = no clipping.
        clip: parameters that `clip_norm` covers: "union" (the model's and the loss's own) or "model" (the model's alone).
        precision: "float32", "channels_last" (float32 in that memory layout), "bfloat16" (forward passes), or "auto" (the
            fastest of a probe at the start of a run).
        cut_channels: train without the channels that are off for the whole round (gates of salience "weight", channels that
            the pruning mask removes): the same result but for rounding, in less time; see `fl_sim.gating.cutting`.
    """

    lr: float = 0.1
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    drop_last: bool = False
    accumulate: int = 1
    optimizer: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    decay: str = "constant"
    decay_to: float = 0.01
    decay_end: int | None = None
    clip_norm: float | None = None
    clip: str = "union"
    precision: str = "float32"
    cut_channels: bool = False

    def __post_init__(self) -> None:
        tables: dict[str, Iterable[str]] = {
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "decay": DECAYS,
            "clip": CLIPS,
        }
        for key, allowed in {**tables, "precision": [*PRECISIONS, "auto"]}.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"training.{key} = {getattr(self, key)!r}: allowed: {', '.join(allowed)}")
        if self.nesterov and not self.momentum:
            raise UserError("training.nesterov = true: needs training.momentum above 0")
        for key in ("lr", "epochs", "batch_size", "accumulate", "steps", "decay_end", "clip_norm"):
            if (value := getattr(self, key)) is not None and value <= 0:
                raise UserError(f"training.{key} = {value}: must be positive")
        if self.steps is not None and self.epochs != 1:
            raise UserError(
                f"training.epochs = {self.epochs} and training.steps = {self.steps}: steps alone would count; "
                "leave one of them out"
            )
        for key in ("lr", "momentum", "weight_decay", "clip_norm"):
            if (value := getattr(self, key)) is not None and not 0 <= value <= LARGEST:
                raise UserError(f"training.{key} = {value}: must be from 0 to {LARGEST:g}")
        if self.warmup < 0 or not 0 < self.decay_to <= 1:
            raise UserError(
                f"training: warmup = {self.warmup} must be at least 0, decay_to = {self.decay_to} above 0 and at most 1"
            )
        if self.decay_end is not None and self.decay_end <= self.warmup:
            raise UserError(f"training.decay_end = {self.decay_end}: must be after the warm-up of {self.warmup} rounds")

    @property
    def changes(self) -> bool:
        """Whether the learning rate depends on the round."""
        return self.warmup > 0 or self.decay != "constant"

    def at(self, number: int) -> Training:
        """The training of round `number`, from 1: with the learning rate of that round.

        Raises:
            UserError: a decay without `decay_end`.
        """
        if not self.changes:
            return self
        if self.decay != "constant" and self.decay_end is None:
            raise UserError(f"training.decay = {self.decay!r}: needs training.decay_end, the round where it ends")
        factor = rate_over_rounds(self.decay, warmup=self.warmup, end=self.decay_end or 0, to=self.decay_to)
        return replace(self, lr=self.lr * factor(number), warmup=0, decay="constant", decay_end=None)

    def fit(
        self,
        model: nn.Module,
        data: Split,
        loss: Loss = cross_entropy,
        *,
        mask: Mask | None = None,
        rng: torch.Generator | None = None,
        trainable: Iterable[str] | None = None,
    ) -> Metrics:
        """Train with these hyper-parameters; see `local_sgd`."""
        if not self.cut_channels:
            return _descend(self, model, data, loss, mask, rng, trainable)
        projection(model, mask)()  # what is cut out is pruned too
        with submodel(model, mask) as sub:
            if sub is None:
                return _descend(self, model, data, loss, mask, rng, trainable)
            metrics = _descend(self, sub.model, data, loss, sub.mask, rng, trainable)
            sub.samples = int(metrics["examples"])
        return metrics

    def samples_of_a_pass(self, model: nn.Module, data: Split) -> int:
        """Samples that one pass over `data` trains on: see `fl_sim.training.passes`."""
        return samples_of_a_pass(
            len(data),
            self.batch_size,
            drop_last=self.drop_last,
            refuses_one=lambda: refuses_batch_of_one(model, data),
        )

    def steps_of(self, samples: int) -> int:
        """Optimizer steps in a round, where a pass trains on so many samples."""
        return self.steps or self.epochs * math.ceil(samples / (self.batch_size * self.accumulate))


def _sgd(parameters: list[nn.Parameter], options: Training) -> Optimizer:
    return SGD(parameters, options.momentum, options.nesterov, options.weight_decay)


def _adamw(parameters: list[nn.Parameter], options: Training) -> Optimizer:
    return AdamW(parameters, options.weight_decay)


OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter], Training], Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def local_sgd(
    model: nn.Module,
    data: Split,
    loss: Loss = cross_entropy,
    *,
    mask: Mask | None = None,
    rng: torch.Generator | None = None,
    trainable: Iterable[str] | None = None,
    **options: object,
) -> Metrics:
    """Train `model` in place on `data`; the keyword `options` are the fields of `Training` (`lr`, `epochs`, ...).

    Args:
        model: holds the received parameters; stays on its device, in training mode.
        data: the client's samples, on the same device.
        loss: `(model, batch) -> scalar`; `ctx.loss` is that of the run's task. A loss that is an `nn.Module` with
            parameters trains them too.
        mask: pruned coordinates are set to zero before the first and after every optimiser step.
        rng: shuffles, augments, and seeds dropout; None keeps the order of the data.
        trainable: names of the parameters to train; by default those that require a gradient (`models.freeze`). BatchNorm
            layers stay in training mode, trained or not.

    Returns:
        `loss` (mean over the samples seen), `steps`, `examples`.

    Raises:
        TrainingDiverged: the mean loss is not finite.
    """
    settings = Training(**options)  # type: ignore[arg-type]
    return settings.fit(model, data, loss, mask=mask, rng=rng, trainable=trainable)


def _descend(
    settings: Training,
    model: nn.Module,
    data: Split,
    loss: Loss,
    mask: Mask | None,
    rng: torch.Generator | None,
    trainable: Iterable[str] | None,
) -> Metrics:
    if settings.changes:
        raise UserError("training.warmup and training.decay depend on the round: training.at(task.round).fit(...)")
    if data.weights is not None and not weighs(loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise UserError(
            f"the loss {name} does not use the samples' weights; needed: ctx.loss, or a loss with weighs = True"
        )
    precision = PRECISIONS[settings.precision]
    if not all(module.training for module in model.modules()):  # to ask costs a fifth of setting it
        model.train()
    whole = settings.samples_of_a_pass(model, data)
    steps = settings.steps_of(whole)
    extra = [p for p in loss.parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
    total = torch.zeros((), device=next(model.parameters()).device)
    seen, counted = 0, 0.0
    with precision.training(model), dropout_from(rng), trained_alone(model, trainable) as own:
        trained = own + extra
        optimizer = OPTIMIZERS[settings.optimizer](trained, settings)
        project = projection(model, mask)
        project()
        schedule = SCHEDULES[settings.schedule]
        batches = endless(data, settings, whole, rng, precision.layout)
        for step, batch in zip(range(steps), batches, strict=False):
            for parameter in trained:
                parameter.grad = None
            if settings.accumulate == 1:
                with precision.context(total.device):
                    value = loss(model, batch)
                value.backward()
            else:
                value = _accumulated(model, batch, loss, settings)
            if settings.clip_norm is not None:
                CLIPS[settings.clip](own, extra, settings.clip_norm)
            optimizer.step(settings.lr * schedule(step / steps))
            project()
            total.add_(value.detach(), alpha=_counts(batch))
            seen += len(batch[1])
            counted += _counts(batch)
    mean = float(total) / counted
    check_converged(mean, steps, settings.lr)
    return {"loss": mean, "steps": steps, "examples": seen}


def check_converged(loss: float, steps: int, lr: float) -> None:
    """Check that the mean training loss is finite.

    Raises:
        TrainingDiverged: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        within = "in 1 step" if steps == 1 else f"within {steps} steps"
        raise TrainingDiverged(
            f"the training loss became {loss} {within}; lower training.lr = {lr}, unless an attack or the aggregation spoilt "
            "the model that was received"
        )


def _accumulated(model: nn.Module, batch: Batch, loss: Loss, settings: Training) -> Tensor:
    """Add up the gradients of a step's batches, each sample with its weight; returns the mean loss of all samples."""
    device = batch[0].device
    mean, whole = torch.zeros((), device=device), _counts(batch)
    for part in parts_of(batch, settings.batch_size):
        with PRECISIONS[settings.precision].context(device):
            value = loss(model, part) * (_counts(part) / whole)
        value.backward()
        mean.add_(value.detach())
    return mean


def _counts(batch: Batch) -> float:
    """What the samples of a batch count: their number, or the sum of their weights."""
    weights = weights_of(batch)
    return len(batch[1]) if weights is None else float(weights.sum())


def endless(
    data: Split,
    settings: Training,
    samples: int,
    rng: torch.Generator | None,
    layout: torch.memory_format = torch.contiguous_format,
) -> Iterator[Batch]:
    """The samples of each optimizer step: pass after pass over the data, the first `samples` of each order."""
    size = settings.batch_size * settings.accumulate
    limit = None if samples == len(data) else samples
    while True:
        yield from data.batches(size, rng=rng, layout=layout, samples=limit)
