"""Learning tasks: the loss, the metrics, and which of them says how good a model is.

A `LearningTask` is itself a loss, `(model, batch) -> scalar`, so it fills the slot of the training loop:

    local_sgd(model, ctx.data, ctx.loss, lr=0.1)
    evaluate(model, data, ctx.loss)                    # {"loss": ..., "accuracy": ..., "examples": ...}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fl_sim.core.lookup import find
from fl_sim.core.types import Metrics, UserError
from fl_sim.data.kinds import Targets, described, target_kind
from fl_sim.data.weights import Batch
from fl_sim.training.losses import cross_entropy_of, mean_loss

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(outputs (B, ...), targets (B, ...)) -> mean loss, a scalar; `torch.func.vmap` must be able to run it."""
Sums = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""(outputs float32, targets) of a batch -> scalars that add up over batches; among them `loss` and `count`, whose ratio is
the mean loss."""
MetricsOf = Callable[[Mapping[str, float]], Metrics]
"""Sums over all batches -> metrics by name."""

FurtherMetric = Callable[[NDArray[np.float32], NDArray[np.generic]], float | None]
"""(outputs (N, K), targets (N,) or (N, K)) of a whole evaluation -> the metric."""


@dataclass(frozen=True)
class Metric:
    """The number that says how good a model is: stops, summaries and reports name it.

    Attributes:
        name: the column of rounds.jsonl.
        higher: whether a higher value is better.
        percent: whether it is a share from 0 to 1, which readers see in percent.
    """

    name: str
    higher: bool
    percent: bool = False


def no_further(sums: Mapping[str, float]) -> Metrics:
    """Nothing beside the loss."""
    return {}


@dataclass(frozen=True)
class LearningTask:
    """What a federation learns. Callable as a loss, `(model, batch) -> scalar`.

    Attributes:
        targets: the kind of targets that the data must have.
        criterion: the loss of outputs beside targets.
        metric: says how good a model is; "loss" is there for every task.
        sums: what is added up while a model is evaluated; None = the criterion alone.
        metrics: further metrics from those sums.
        further: metrics by name that need all outputs (N, K) and targets as arrays; None where the samples do not define one.
        class_scores: whether outputs (B, classes) are scores of one class each, which distillation and label smoothing need.
        beside: what `metrics` gives beside `metric`; `stop` may name these.
        token_scores: whether outputs (B, T, tokens) are scores of one token each, which logit distillation takes too.
    """

    targets: Targets
    criterion: Criterion
    metric: Metric = Metric("loss", higher=False)
    sums: Sums | None = None
    metrics: MetricsOf = no_further
    class_scores: bool = False
    further: Mapping[str, FurtherMetric] = field(default_factory=dict, hash=False)
    beside: tuple[Metric, ...] = ()
    token_scores: bool = False
    weighs: ClassVar[bool] = True

    @property
    def measures(self) -> dict[str, Metric]:
        """Every metric of an evaluation by its name, the one that counts first."""
        asked = [Metric(name, higher=True, percent=True) for name in self.further]
        return {each.name: each for each in (self.metric, *self.beside, *asked, Metric("loss", higher=False))}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch."""
        return mean_loss(self.criterion, model(batch[0]), batch)

    def added(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """The sums of one batch."""
        if self.sums is not None:
            return self.sums(outputs, targets)
        count = torch.tensor(len(targets))
        return {"loss": self.criterion(outputs, targets) * len(targets), "count": count}

    def measured(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Metrics:
        """The further metrics from all (outputs, targets) of an evaluation; NaN where an output is not finite."""
        if not self.further:
            return {}
        whole = [torch.cat([part.cpu() for part in parts]) for parts in zip(*batches, strict=True)]
        if self.targets is Targets.TOKENS:
            whole = [whole[0].flatten(0, 1), whole[1].flatten()]
        outputs, targets = (tensor.numpy() for tensor in whole)
        if not np.isfinite(outputs).all():
            return dict.fromkeys(self.further, math.nan)
        found = {name: metric(outputs, targets) for name, metric in self.further.items()}
        return {name: value for name, value in found.items() if value is not None}


def _class_sums(outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    return {
        "loss": functional.cross_entropy(outputs, targets, reduction="sum"),
        "correct": (outputs.argmax(dim=1) == targets).sum(),
        "count": torch.tensor(len(targets)),
    }


def _accuracy(sums: Mapping[str, float]) -> Metrics:
    return {"accuracy": sums["correct"] / sums["count"]}


def _token_sums(outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    return _class_sums(outputs.flatten(0, 1), targets.flatten())


def _perplexity(sums: Mapping[str, float]) -> Metrics:
    # The exponential of a diverged loss has no float: infinity, as of the loss itself.
    mean = sums["loss"] / sums["count"]
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, **_accuracy(sums)}


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs.reshape(targets.shape), targets)


def _error_sums(outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    true, error = targets.double(), outputs.reshape(targets.shape).double() - targets.double()
    return {
        "loss": error.square().sum(),
        "count": torch.tensor(targets.numel()),
        "absolute": error.abs().sum(),
        "total": true.sum(),
        "squares": true.square().sum(),
    }


def _errors(sums: Mapping[str, float]) -> Metrics:
    count = sums["count"]
    found = {"rmse": math.sqrt(sums["loss"] / count), "mae": sums["absolute"] / count}
    spread = sums["squares"] - sums["total"] ** 2 / count
    # The share of the variance that is explained; equal targets have none.
    return found | ({"r2": 1 - sums["loss"] / spread} if spread > 1e-12 * max(1.0, sums["squares"]) else {})


def _each_label(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))


def _label_sums(outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    said = outputs > 0
    return {
        "loss": functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum"),
        "count": torch.tensor(targets.numel()),
        "both": (said & targets).sum(),
        "either": said.sum() + targets.sum(),
    }


def _f1(sums: Mapping[str, float]) -> Metrics:
    # No label anywhere and none predicted: everything was right.
    return {"f1": 2 * sums["both"] / sums["either"] if sums["either"] else 1.0}


CLASSIFICATION = LearningTask(
    Targets.CLASSES, functional.cross_entropy, Metric("accuracy", True, True), _class_sums, _accuracy, class_scores=True
)
TASKS: Mapping[str, LearningTask] = {
    "classification": CLASSIFICATION,
    "regression": LearningTask(
        Targets.NUMBERS,
        _squared_error,
        Metric("rmse", higher=False),
        _error_sums,
        _errors,
        beside=(Metric("mae", higher=False), Metric("r2", higher=True)),
    ),
    "multilabel": LearningTask(Targets.LABELS, _each_label, Metric("f1", True, True), _label_sums, _f1),
    "next_token": LearningTask(
        Targets.TOKENS,
        cross_entropy_of,
        Metric("perplexity", higher=False),
        _token_sums,
        _perplexity,
        beside=(Metric("accuracy", True, True),),
        token_scores=True,
    ),
}
WORDS: Mapping[str, str] = {
    "classification": "One class each: cross-entropy; accuracy.",
    "regression": "Numbers: mean squared error; RMSE, lower is better, with MAE and R2.",
    "multilabel": "Several labels each: binary cross-entropy; F1 over all labels and samples.",
    "next_token": "The next token at every position: cross-entropy; perplexity, lower is better, with accuracy.",
}


def learning_task(name: str) -> LearningTask:
    """The task of this name, or behind an import path, `module:name`.

    Raises:
        UserError: no such task, or something else behind the path.
    """
    found: object = find("task", name, TASKS)
    if not isinstance(found, LearningTask):
        raise UserError(
            f"task = {name!r} is of type {type(found).__name__}; needed: fl_sim.training.tasks.LearningTask"
        )
    return found


def task_for(targets: Tensor) -> LearningTask:
    """The named task that has targets of this kind. Raises UserError where none has."""
    kind = target_kind(targets)
    for task in TASKS.values():
        if task.targets is kind:
            return task
    raise UserError(f"targets are {described(targets)}; no task has such")
