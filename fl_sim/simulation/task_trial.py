"""Tries a task of the user's own once before round 1, on the first model's outputs for some samples of the run."""

from __future__ import annotations

import math
import warnings
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
    if (said := _not_a_mean(task, outputs, batch[1])) is not None:
        raise UserError(f"{where}: on {told} {said}{here}")


def _not_a_mean(task: LearningTask, outputs: Tensor, targets: Tensor) -> str | None:
    """What is wrong with a criterion that is no mean over the samples, or sets each output beside the targets of all; else None."""

    def loss(outputs: Tensor, targets: Tensor) -> float:
        with warnings.catch_warnings():  # PyTorch's own words on broadcasting: ours are in the error
            warnings.simplefilter("ignore")
            return float(task.criterion(outputs, targets))

    outputs = outputs + 0.1 * torch.randn_like(outputs)  # a head that starts at zero answers the same to all
    try:
        once, twice = loss(outputs, targets), loss(outputs.repeat_interleave(2, 0), targets.repeat_interleave(2, 0))
        moved = [loss(outputs, targets.roll(by, 0)) for by in (1, 3)]
        alike = loss(outputs, targets[:1].expand_as(targets))
    except USERS_OWN:  # it takes what the loop gives it, and need not take others
        return None
    if _is_near(twice, 2 * once) and not _is_near(once, 0.0):
        return "its criterion is a sum over the samples, twice as large for twice as many; needed: the mean loss"
    if _widened(outputs, targets) and all(_is_near(each, once) for each in moved) and not _is_near(alike, once):
        return (
            "its criterion compares the outputs of each sample with the targets of all samples, because PyTorch broadcasts "
            "these shapes; needed: one shape, for instance outputs.squeeze(1)"
        )
    return None


def _widened(outputs: Tensor, targets: Tensor) -> bool:
    """Whether an elementwise operation on both is larger than either of them."""
    try:
        both = torch.broadcast_shapes(outputs.shape, targets.shape)
    except RuntimeError:  # they do not go together
        return False
    return bool(both.numel() > max(outputs.numel(), targets.numel()))


def _is_near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-12)


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
