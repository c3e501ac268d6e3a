"""Clients by name: each a line of composition over `LocalClient`.

A preset takes keyword arguments only: `training` from the config's `[training]` table, the rest from `[client]`.
"""

from __future__ import annotations

from collections.abc import Sequence

from clients.distillation import LearnFeatures, LearnLogits
from clients.distillation import teacher as teacher_of
from clients.local import LocalClient, ProximalLoss, TopK
from fl_sim.losses import Distillation, FeatureDistillation
from fl_sim.training import Training
from fl_sim.types import Client


def fedavg(*, training: Training) -> Client:
    """Plain local SGD; uploads everything that is alive (FedAvg; McMahan et al., 2017)."""
    return LocalClient(training)


def fedprox(*, training: Training, mu: float = 0.01) -> Client:
    """FedAvg with a proximal term of weight `mu` (FedProx; Li et al., 2020)."""
    return LocalClient(training, loss=ProximalLoss(mu))


def topk(*, training: Training, density: float = 0.1) -> Client:
    """Uploads the `density` share of weights that changed most; add `wire.error_feedback = true` to carry the rest over."""
    return LocalClient(training, upload=TopK(density))


def distillation(
    *, training: Training, temperature: float = 4.0, alpha: float = 0.5, teacher: str = "global"
) -> Client:
    """Distils from the logits of the global model as received, at no extra byte (FedGKD; Yao et al., 2021).

    Args:
        training: the config's `[training]` table.
        temperature: softens both sides' logits.
        alpha: weight of the teacher; the labels have 1 - alpha.
        teacher: "global", or a model file that every client has already (its bytes are not booked).
    """
    return LocalClient(training, loss=LearnLogits(Distillation(temperature, alpha), teacher_of(teacher)))


def feature_distillation(
    *,
    training: Training,
    alpha: float = 0.5,
    beta: float = 0.5,
    stages: Sequence[str] = (),
    teacher: str = "global",
) -> Client:
    """Distils from the stages of the global model as received, through 1x1 projections (arXiv 2605.31191).

    Projections stay with the client and train with its model: same optimiser, and gradients clipped over the union
    (`training.clip_norm`; `training.clip = "model"` reproduces the published code, which left the projections out).

    Args:
        training: the config's `[training]` table.
        alpha: weight of the teacher; the labels have 1 - alpha.
        beta: weight of the cosine term beside the squared error.
        stages: names of the submodules whose outputs are compared; empty = the residual stages.
        teacher: "global", or a model file that every client has already (its bytes are not booked).
    """
    loss = LearnFeatures(FeatureDistillation(alpha, beta), teacher_of(teacher), tuple(stages))
    return LocalClient(training, loss=loss)
