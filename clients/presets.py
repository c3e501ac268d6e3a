"""Clients by name: each a line of composition over `LocalClient`.

A preset takes keyword arguments only: `training` from the config's `[training]` table, the rest from `[client]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from clients.distillation import LearnFeatures, LearnLogits
from clients.distillation import teacher as teacher_of
from clients.local import Always, LocalClient, ProximalLoss, Retain, TopK, Upload, cross_entropy_loss, upload_all
from clients.retention import (
    EXTENTS,
    FollowGap,
    Gates,
    Ratio,
    RetainChannels,
    at_random,
    change_magnitude,
    own_ratio,
    ratio_of,
    retain_active,
)
from clients.shared import SharedRandom
from clients.threshold import ThresholdEachEpoch, not_zero
from fl_sim.core.lookup import find
from fl_sim.core.types import UserError
from fl_sim.gating import Gating
from fl_sim.training.client import Client
from fl_sim.training.loop import Training
from fl_sim.training.losses import CrossEntropy, Distillation, FeatureDistillation, teacher_std, unscaled

Preset = TypeVar("Preset", bound=Callable[..., Client])


def _stateless(preset: Preset) -> Preset:
    """Say that this preset's clients keep nothing of their data between rounds: what differential privacy must know."""
    preset.stateless = True  # type: ignore[attr-defined]
    return preset


SCALES = {"none": unscaled, "teacher_std": teacher_std}
"""By what feature distillation divides both sides."""


@_stateless
def fedavg(*, training: Training, label_smoothing: float = 0.0) -> Client:
    """Plain local SGD, labels smoothed where asked; uploads all that is alive (FedAvg; McMahan et al., 2017)."""
    return LocalClient(training, loss=Always(CrossEntropy(label_smoothing)) if label_smoothing else cross_entropy_loss)


@_stateless
def fedprox(*, training: Training, mu: float = 0.01) -> Client:
    """FedAvg with a proximal term of weight `mu` (FedProx; Li et al., 2020)."""
    return LocalClient(training, loss=ProximalLoss(mu))


@_stateless
def topk(*, training: Training, density: float = 0.1) -> Client:
    """Uploads the `density` share of weights that changed most; add `wire.error_feedback = true` to carry the rest over."""
    return LocalClient(training, upload=TopK(density))


@_stateless
def shared_random(*, training: Training, density: float = 0.1) -> Client:
    """Uploads the same random `density` share of weights as every other client, drawn anew each round (`sparsity.Shared`)."""
    return LocalClient(training, upload=SharedRandom(density))


@_stateless
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
    scale: str = "none",
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
        scale: what both sides are divided by: "none", or "teacher_std", which makes teachers comparable.
        teacher: "global", or a model file that every client has already (its bytes are not booked).
    """
    objective = FeatureDistillation(alpha, beta, find("client.scale", scale, SCALES))
    loss = LearnFeatures(objective, teacher_of(teacher), tuple(stages))
    return LocalClient(training, loss=loss)


def _retaining(training: Training, ratio: Ratio, retain: Retain, density: float) -> LocalClient:
    upload: Upload = upload_all if density == 1.0 else TopK(density)
    return LocalClient(training, setting=Gates(ratio), retain=retain, upload=upload)


def _needed(gating: Gating | None) -> Gating:
    if gating is None:
        raise UserError("this client trains a gated model: add a [gating] table to the config")
    return gating


@_stateless
def adaptive_pruning(
    *,
    training: Training,
    gating: Gating | None,
    keep_up: float = 0.5,
    density: float = 1.0,
    profile: Sequence[float] = (),
    extent: str = "rows",
) -> Client:
    """Per-sample channel gates; retains and uploads the channels that were salient for the client's data.

    The composite of `fl_sim.gating.gate` (arXiv 2106.06921) with an upload protocol of our own, which the paper leaves
    open: the `keep_up` share of each gated layer's channels with the highest salience, summed over the round's samples,
    keeps what it learnt; filters, BatchNorm entries and gate rows go together. BatchNorm statistics always travel.

    Args:
        training: the config's `[training]` table.
        gating: the config's `[gating]` table.
        keep_up: share of the channels retained.
        density: share of all prunable weights sent, those that changed most among the retained (`topk`); 1 sends all.
        profile: heterogeneous devices: each client draws its keep ratio from these, instead of the table's.
        extent: "rows" of the retained channels, or "rows_and_columns": less what reads the others in the next layer.
    """
    retain = RetainChannels(keep_up, extent=find("client.extent", extent, EXTENTS))
    return _retaining(training, ratio_of(_needed(gating), profile), retain, density)


@_stateless
def distilled_pruning(
    *,
    training: Training,
    gating: Gating | None,
    keep_up: float = 1.0,
    density: float = 0.1,
    temperature: float = 4.0,
    alpha: float = 0.3,
) -> Client:
    """Adaptive pruning whose clients also distil from the global model as received; see both presets.

    Args:
        training, gating, keep_up, density: see `adaptive_pruning`.
        temperature, alpha: see `distillation`.
    """
    pruning = _retaining(training, ratio_of(_needed(gating), ()), RetainChannels(keep_up), density)
    return replace(pruning, loss=LearnLogits(Distillation(temperature, alpha), teacher_of("global")))


def gap_pruning(
    *,
    training: Training,
    gating: Gating | None,
    keep_up: float = 0.5,
    density: float = 1.0,
    limit: float = 0.1,
    step: float = 0.1,
    least: float = 0.5,
    holdout: float = 0.1,
) -> Client:
    """Adaptive pruning whose keep ratio follows each client's own over-fitting; see `clients.retention.FollowGap`.

    Args:
        training, gating, keep_up, density: see `adaptive_pruning`; the server evaluates at the table's ratio.
        limit: gap between validation and training loss, in nats, above which a client prunes more.
        step: by how much the ratio moves a round.
        least: the lowest ratio.
        holdout: share of the client's samples kept for validation.
    """
    _needed(gating)
    return FollowGap(_retaining(training, own_ratio, RetainChannels(keep_up), density), limit, step, least, holdout)


@_stateless
def random_channels(*, training: Training, gating: Gating | None, keep_up: float = 0.5, density: float = 1.0) -> Client:
    """Control of adaptive pruning: retains as many channels, drawn at random each round."""
    return _retaining(training, ratio_of(_needed(gating), ()), RetainChannels(keep_up, at_random), density)


@_stateless
def magnitude_channels(
    *, training: Training, gating: Gating | None, keep_up: float = 0.5, density: float = 1.0
) -> Client:
    """Control of adaptive pruning: retains as many channels, those with the largest filters in the received model."""
    return _retaining(training, ratio_of(_needed(gating), ()), RetainChannels(keep_up, change_magnitude), density)


@_stateless
def active_channels(*, training: Training, gating: Gating | None, density: float = 1.0) -> Client:
    """Control of adaptive pruning: retains every channel that was on for any sample, which is nearly all of them."""
    return _retaining(training, ratio_of(_needed(gating), ()), retain_active, density)


@_stateless
def weight_threshold(*, training: Training, threshold: float = 1e-3) -> Client:
    """Zeroes convolution weights up to `threshold` after each local epoch and uploads the rest.

    The rule of the authors' second code for arXiv 2106.06921. Its uploads were dense and its zeros entered the mean;
    here a zero does not travel, and the mean of a weight is over the clients that sent it.
    """
    return LocalClient(ThresholdEachEpoch(training, threshold), upload=not_zero)
