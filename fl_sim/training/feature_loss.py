"""The loss of feature distillation between two models: which stages, and projections of the right widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fl_sim.models import stage_names
from fl_sim.training.losses import FeatureDistillation, FeaturesFromTeacher, Projections, with_features


def feature_loss(
    student: nn.Module,
    teacher: nn.Module,
    image: Tensor,
    *,
    objective: FeatureDistillation,
    rng: torch.Generator,
    stages: Sequence[str] = (),
) -> FeaturesFromTeacher:
    """The loss that compares stage by stage, with projections drawn from `rng`.

    Args:
        student, teacher: on one device; both are left in evaluation mode.
        image: any image (1, C, H, W) on that device: it tells the widths.
        objective: the formula.
        rng: CPU generator.
        stages: names of the submodules that are compared, in both models; empty = `models.stage_names` of each.

    Raises:
        UserError: no such stage, or not equally many.
    """
    own, theirs = (list(stages) or stage_names(model) for model in (student, teacher))
    projections = Projections(_channels(student, image, own), _channels(teacher, image, theirs), rng=rng)
    pairs = list(zip(own, theirs, strict=True))
    return FeaturesFromTeacher(teacher, projections.to(image.device), stages=pairs, objective=objective)


def _channels(model: nn.Module, image: Tensor, stages: Sequence[str]) -> list[int]:
    with torch.no_grad():
        _, features = with_features(model.eval(), image, stages)
    return [feature.shape[1] for feature in features]
