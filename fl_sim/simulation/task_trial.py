"""Tries a task of the user's own once before round 1, on the first model's outputs for some samples of the run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.core.types import UserError
from fl_sim.data.kinds import described
from fl_sim.data.split import Split
from fl_sim.data.weights import Batch
from fl_sim.simulation.client_side import client_of
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.training.losses import mean_loss
from fl_sim.training.tasks import LearningTask

SAMPLES = 32
"""Of the training set, at equal distances, so that sorted data show several classes."""


def try_task(track: ModelTrack) -> None:
    """Compute the loss, its gradient and the metrics of a task that is behind an import path.

    Raises:
        UserError: names the task, what it did, and what is needed.
    """
    experiment, where = track.experiment, f"task = {track.experiment.task!r}"
    if ":" not in experiment.task:
        return
    batch, outputs = _answered(track)
    task = experiment.learning
    with unchanged_settings(), seeded(0):
        if getattr(client_of(track), "training", None) is not None:  # a client of the user's may have a loss of its own
            _try_loss(where, task, batch, outputs)
        _try_metrics(where, task, batch, outputs)


def _answered(track: ModelTrack) -> tuple[Batch, Tensor]:
    """Some samples, and what the first model answers to them."""
    train = track.data.train
    count = min(SAMPLES, len(train))
    some: Split = train.subset(torch.arange(count).mul_(len(train)).div_(count, rounding_mode="floor").numpy())
    batch = next(iter(some.to(track.device).batches(count, rng=None)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            outputs: Tensor = track.model.eval()(batch[0])
        finally:
            track.built.put_back()
    return batch, outputs.float()


def _try_loss(where: str, task: LearningTask, batch: Batch, outputs: Tensor) -> None:
    """The loss of a training step, and its gradient."""
    varied = outputs.clone().requires_grad_()
    told = f"outputs {described(outputs)} and targets {described(batch[1])}"
    try:
        loss = mean_loss(task.criterion, varied, batch)
    except USERS_OWN as error:  # the user's own, whatever it is
        raise UserError(f"{where}: on {told} its criterion raised {error_line(error)}") from error
    here = _defined(task.criterion)
    if not isinstance(loss, Tensor) or loss.dim():
        got = described(loss) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"{where}: on {told} its criterion returned {got}{here}; needed: the mean loss, a scalar tensor"
        )
    try:
        torch.autograd.grad(loss, varied)
    except USERS_OWN as error:  # it does not come from the outputs, or through a function without a gradient
        raise UserError(
            f"{where}: its criterion's loss has no gradient by the outputs{here}; needed: a loss that PyTorch computes from "
            "them, without .item(), .detach() or NumPy"
        ) from error


def _try_metrics(where: str, task: LearningTask, batch: Batch, outputs: Tensor) -> None:
    """An evaluation, as `fl_sim.training.evaluation` does it."""
    needed = "needed: scalars by name, among them 'loss' and 'count'"
    try:
        with torch.inference_mode():
            added = task.added(outputs, batch[1])
            sums = {name: float(value) for name, value in added.items()}
            mean = sums["loss"] / sums["count"]
            found = {"loss": mean, **task.metrics(sums), **task.measured([(outputs, batch[1])])}
    except USERS_OWN as error:  # the user's own, whatever it is
        raise UserError(f"{where}: in an evaluation it raised {error_line(error)}; {needed}") from error
    if task.metric.name not in found:
        raise UserError(
            f"{where}: its metric {task.metric.name!r} is not among what an evaluation gives: {', '.join(found)}"
        )


def _defined(function: object) -> str:
    """Where a function of the user's stands; empty where it does not say."""
    code = getattr(function, "__code__", None)
    return "" if code is None else f" ({Path(code.co_filename).name}, line {code.co_firstlineno})"
