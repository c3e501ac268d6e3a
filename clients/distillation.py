"""Learning from a teacher while training locally: who teaches, and the losses that ask.

client = LocalClient(training, loss=LearnLogits(Distillation(temperature=2.0, alpha=0.3), teacher=received))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import Task, UserError
from fl_sim.models import stage_names
from fl_sim.models.parameters import COUNTER
from fl_sim.training.client import ClientContext
from fl_sim.training.feature_loss import feature_loss
from fl_sim.training.losses import (
    Distillation,
    FeatureDistillation,
    FromTeacher,
    Loss,
    cross_entropy,
    with_features,
)
from fl_sim.training.model_file import read_model, require
from fl_sim.training.recalibration import recalibrate

Teacher = Callable[[Task, ClientContext], nn.Module | None]
"""(task, context whose model holds the received parameters) -> a frozen model, or None: learn from the labels alone."""


def frozen(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters require no gradient."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def received(task: Task, ctx: ClientContext) -> nn.Module | None:
    """The global model as received (FedGKD; Yao et al., 2021; buffer of one): no extra byte. None in round 1: it is random.

    Where BatchNorm statistics do not travel, they are measured on the client's own samples: none fit the new weights.
    """
    if task.round == 1:
        return None
    teacher = frozen(ctx.model)
    statistics = {name for name, _ in teacher.named_buffers() if not name.endswith(COUNTER)}
    return recalibrate(teacher, ctx.data.augmented(None)) if statistics - task.params.keys() else teacher


@dataclass(frozen=True)
class TeacherFile:
    """Teacher from a model file, of any architecture with the same classes.

    The file is on every client already, so no bytes are booked for it.
    """

    path: Path

    def __post_init__(self) -> None:
        require(self.path)

    def __call__(self, task: Task, ctx: ClientContext) -> nn.Module:
        return _resident(self.path, ctx.data.device)


@lru_cache(maxsize=1)
def _resident(path: Path, device: torch.device) -> nn.Module:
    """Read once a process: all clients of a federation share their frozen teacher."""
    return read_model(path).to(device)


def teacher(name: str) -> Teacher:
    """ "global", or the path of a model file."""
    return received if name == "global" else TeacherFile(Path(name))


@dataclass(frozen=True)
class LearnLogits:
    """Distillation from the teacher's logits."""

    objective: Distillation
    teacher: Teacher = received
    class_scores: ClassVar[bool] = True
    token_scores: ClassVar[bool] = True
    reads_outputs_alone: ClassVar[bool] = True

    def __call__(self, task: Task, ctx: ClientContext) -> Loss:
        teacher = self.teacher(task, ctx)
        return cross_entropy if teacher is None else FromTeacher(teacher, self.objective)


@dataclass(frozen=True)
class LearnFeatures:
    """Distillation from the outputs of the teacher's stages, through projections that the client keeps.

    Attributes:
        objective: the formula.
        teacher: whose stages.
        stages: names of the submodules that are compared, in student and teacher alike; empty = `models.stage_names`.
    """

    objective: FeatureDistillation
    teacher: Teacher = received
    stages: Sequence[str] = ()
    class_scores: ClassVar[bool] = True

    def require(self, model: nn.Module, image: torch.Tensor) -> None:
        """Complain, before anything is trained, of stages that are not there or give no images. Raises UserError."""
        names = list(self.stages) or stage_names(model)
        for name, feature in zip(names, with_features(model, image, names)[1], strict=True):
            if not isinstance(feature, torch.Tensor) or feature.dim() != 4:
                shape = tuple(feature.shape) if isinstance(feature, torch.Tensor) else type(feature).__name__
                raise UserError(f"stages: {name!r} gives {shape}; needed: (N, channels, height, width)")

    def __call__(self, task: Task, ctx: ClientContext) -> Loss:
        teacher = self.teacher(task, ctx)
        if teacher is None:
            return cross_entropy
        # The rng of training is not touched, so that a teacher without weight changes nothing.
        rng = generator(ctx.seed, Purpose.PROJECTION)
        image = ctx.data.example()
        return feature_loss(ctx.model, teacher, image, objective=self.objective, rng=rng, stages=self.stages)
