"""Clients by name: each a line of composition over `LocalClient`.

A preset takes keyword arguments only: `training` from the config's `[training]` table, the rest from `[client]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from clients.contrast import ModelContrast, remember
from clients.corrections import (
    ALPHA,
    CONTROL,
    LOSS,
    STEPS,
    ControlVariate,
    DynamicRegulariser,
    EffectiveSteps,
    received_loss,
    require_plain,
)
from clients.distillation import LearnFeatures, LearnLogits
from clients.distillation import teacher as teacher_of
from clients.local import Always, LocalClient, ProximalLoss, Retain, TopK, Upload, task_loss, upload_all
from clients.personal import Ditto, FineTune, HeadFirst
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
from fl_sim.training.client import BATCHNORM, PARTS, Client
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
    """Local SGD; uploads every weight that is not pruned (FedAvg; McMahan et al., 2017).

    Args:
        training: the config's `[training]` table.
        label_smoothing: label smoothing of the cross-entropy, from 0 to 1.
    """
    return LocalClient(training, loss=Always(CrossEntropy(label_smoothing)) if label_smoothing else task_loss)


@_stateless
def fedprox(*, training: Training, mu: float = 0.01) -> Client:
    """FedAvg with a proximal term towards the received model (FedProx; Li et al., 2020).

    Args:
        training: the config's `[training]` table.
        mu: weight of the proximal term, at least 0; 0 is FedAvg.
    """
    return LocalClient(training, loss=ProximalLoss(mu))


def scaffold(*, training: Training, option: int = 2) -> Client:
    """SCAFFOLD (Karimireddy et al., 2020, algorithm 1): local steps corrected by control variates, which double the bytes.

    Goes with `strategies.presets:scaffold`. Local training is SGD without momentum.

    Args:
        training: the config's `[training]` table.
        option: of equation 4: 1, the gradient of all samples at the received model (one more pass over the data); 2, the
            mean of the local steps.
    """
    require_plain(training, "clients.presets:scaffold")
    if option not in (1, 2):
        raise UserError(f"client.option = {option}: allowed: 1, 2")
    control = ControlVariate(training, option)
    return LocalClient(training, loss=control.loss, fit=control.fit, report=control.report, extra=CONTROL)


def feddyn(*, training: Training) -> Client:
    """FedDyn (Acar et al., 2021, algorithm 1): dynamic regularisation; each client keeps a gradient, and sends nothing more.

    Goes with `strategies.presets:feddyn`, which sends alpha.

    Args:
        training: the config's `[training]` table.
    """
    dynamic = DynamicRegulariser()
    return LocalClient(training, loss=dynamic.loss, report=dynamic.report, extra=ALPHA)


@_stateless
def fednova(*, training: Training) -> Client:
    """FedNova's client (Wang et al., 2020): FedAvg that also reports its effective number of local steps.

    Goes with `strategies.presets:fednova`. Local training is SGD, with momentum or without.

    Args:
        training: the config's `[training]` table.
    """
    require_plain(training, "clients.presets:fednova", momentum=True)
    return LocalClient(training, report=EffectiveSteps(training.momentum), extra=STEPS)


@_stateless
def qfedavg(*, training: Training) -> Client:
    """q-FedAvg's client (Li et al., 2020): FedAvg that also reports the loss of the received model on its samples.

    Goes with `strategies.presets:qfedavg`.

    Args:
        training: the config's `[training]` table.
    """
    return LocalClient(training, report=received_loss, extra=LOSS)


def moon(*, training: Training, mu: float = 1.0, temperature: float = 0.5) -> Client:
    """MOON (Li, He and Song, 2021): representations near the received model's, far from the client's previous one (eq. 3, 4).

    Args:
        training: the config's `[training]` table.
        mu: weight of the contrastive term, at least 0; 0 is FedAvg.
        temperature: temperature of the contrastive term, above 0.
    """
    return LocalClient(training, loss=ModelContrast(mu, temperature), report=remember)


@_stateless
def fedper(*, training: Training) -> Client:
    """FedAvg of the shared parts, with a head that each client keeps (FedPer; Arivazhagan et al., 2019, algorithm 1).

    Needs `model.personal = "head"`, or another part, and `evaluate.clients`.

    Args:
        training: the config's `[training]` table; head and shared parts train together.
    """
    return LocalClient(training, keeps=PARTS)


@_stateless
def fedbn(*, training: Training) -> Client:
    """FedAvg of all but BatchNorm, which each client keeps with its statistics (FedBN; Li et al., 2021, algorithm 1).

    Needs `model.personal = "batchnorm"`, `model.statistics = "local"` and `evaluate.clients`.

    Args:
        training: the config's `[training]` table.
    """
    return LocalClient(training, keeps=BATCHNORM)


@_stateless
def fedrep(*, training: Training, head_epochs: int = 1, head_steps: int | None = None) -> Client:
    """First the head that a client keeps, then the shared parts (FedRep; Collins et al., 2021, algorithm 1).

    Needs `model.personal = "head"`, or another part, and `evaluate.clients`.

    Args:
        training: the config's `[training]` table; its epochs or steps are those of the shared parts.
        head_epochs: passes over the client's data for the head, at least 1; refused beside `head_steps`.
        head_steps: optimizer steps for the head, instead of epochs.
    """
    head = _tuning("head", training, head_epochs, head_steps)
    return LocalClient(training, fit=HeadFirst(head, training), keeps=PARTS)


@_stateless
def fine_tuned(*, training: Training, tune_epochs: int = 1, tune_steps: int | None = None) -> Client:
    """FedAvg whose clients train the received model on their own data before they evaluate it (Wang et al., 2019).

    Federated evaluation of on-device personalization, arXiv 1910.10252. Needs `evaluate.clients`; `clients_accuracy` is of
    the models so trained, `accuracy` of the global one. Nothing of the tuning is kept or sent.

    Args:
        training: the config's `[training]` table.
        tune_epochs: passes over the client's data before evaluation, at least 1; refused beside `tune_steps`.
        tune_steps: optimizer steps before evaluation, instead of epochs.
    """
    return LocalClient(training, before_evaluation=FineTune(_tuning("tune", training, tune_epochs, tune_steps)))


def ditto(
    *, training: Training, mu: float = 0.1, personal_epochs: int = 1, personal_steps: int | None = None
) -> Client:
    """FedAvg, and beside it a personal model pulled to the received one (Ditto; Li et al., 2021, algorithm 1).

    Needs `evaluate.clients`: `clients_accuracy` is of the personal models, `accuracy` of the global one. A personal model is
    kept by its client and never travels.

    Args:
        training: the config's `[training]` table, of the global model.
        mu: strength of the pull (lambda in the paper), at least 0; 0 trains personal models on their client's data alone.
        personal_epochs: passes over the client's data for its personal model, at least 1; refused beside `personal_steps`.
        personal_steps: optimizer steps for the personal model, instead of epochs.
    """
    return Ditto(LocalClient(training), _tuning("personal", training, personal_epochs, personal_steps), mu)


def _tuning(what: str, training: Training, epochs: int, steps: int | None) -> Training:
    """The training of one part of a method: other epochs or steps, all else as in `[training]`."""
    for key, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and value < 1:
            raise UserError(f"client.{what}_{key} = {value}: must be at least 1")
    if steps is not None and epochs != 1:
        both = f"client.{what}_epochs = {epochs} and client.{what}_steps = {steps}"
        raise UserError(f"{both}: steps alone would count; leave one of them out")
    return replace(training, epochs=epochs, steps=steps)


@_stateless
def topk(*, training: Training, density: float = 0.1) -> Client:
    """Top-k upload: the weights that changed most. `wire.error_feedback = true` carries the others over to the next upload.

    Args:
        training: the config's `[training]` table.
        density: share of the prunable weights uploaded, from 0 to 1.
    """
    return LocalClient(training, upload=TopK(density))


@_stateless
def shared_random(*, training: Training, density: float = 0.1) -> Client:
    """Uploads random weights, the same ones on every client, drawn anew each round (`sparsity.Shared`).

    Args:
        training: the config's `[training]` table.
        density: share of the prunable weights uploaded, from 0 to 1.
    """
    return LocalClient(training, upload=SharedRandom(density))


@_stateless
def distillation(
    *, training: Training, temperature: float = 4.0, alpha: float = 0.5, teacher: str = "global"
) -> Client:
    """Distil from the logits of the global model as received, at no extra byte (FedGKD; Yao et al., 2021).

    Args:
        training: the config's `[training]` table.
        temperature: softens the logits of teacher and student, above 0.
        alpha: weight of the teacher's loss, from 0 to 1; the labels' loss has 1 - alpha.
        teacher: "global" (from round 2 on; in round 1, with `model.weights` too, the labels alone teach), or a model file that
            every client has already (its bytes are not booked).
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
        alpha: weight of the teacher's loss, from 0 to 1; the labels' loss has 1 - alpha.
        beta: weight of the cosine term beside the squared error, at least 0.
        stages: names of the submodules whose outputs are compared; empty = the residual stages.
        scale: "none", or "teacher_std": divides the features of both by the teacher's standard deviation.
        teacher: "global" (from round 2 on; in round 1, with `model.weights` too, the labels alone teach), or a model file that
            every client has already (its bytes are not booked).
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
    """Per-sample channel gates; keeps and uploads the changes of the channels that were salient for the client's data.

    The composite of `fl_sim.gating.gate` (arXiv 2106.06921) with an upload protocol of our own, which the paper leaves
    open: the `keep_up` share of each gated layer's channels with the highest salience, summed over the round's samples,
    keeps what it learnt; filters, BatchNorm entries and gate rows go together. BatchNorm statistics always travel.

    Args:
        training: the config's `[training]` table.
        gating: the config's `[gating]` table.
        keep_up: share of the channels that are retained and uploaded, above 0 and at most 1.
        density: top-k within the retained channels, as a share of all prunable weights; 1 sends all of them.
        profile: keep ratios of different devices: each client draws one, in place of `gating.keep`; empty = all the same.
        extent: "rows" (all weights of the retained channels), or "rows_and_columns" (without the next layer's weights
            that read other channels).
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
        training, gating, keep_up, density: see `adaptive_pruning`; the server evaluates at `gating.keep`.
        limit: gap between validation and training loss, in nats, above which a client lowers its keep ratio.
        step: change of the keep ratio in a round, between 0 and 1.
        least: lowest keep ratio, between 0 and 1.
        holdout: share of the client's samples held out for validation, between 0 and 1.
    """
    _needed(gating)
    return FollowGap(_retaining(training, own_ratio, RetainChannels(keep_up), density), limit, step, least, holdout)


@_stateless
def random_channels(*, training: Training, gating: Gating | None, keep_up: float = 0.5, density: float = 1.0) -> Client:
    """Control of adaptive pruning: retains as many channels, drawn at random each round.

    Args:
        training, gating, keep_up, density: see `adaptive_pruning`.
    """
    return _retaining(training, ratio_of(_needed(gating), ()), RetainChannels(keep_up, at_random), density)


@_stateless
def magnitude_channels(
    *, training: Training, gating: Gating | None, keep_up: float = 0.5, density: float = 1.0
) -> Client:
    """Control of adaptive pruning: retains as many channels, those with the largest filters in the received model.

    Args:
        training, gating, keep_up, density: see `adaptive_pruning`.
    """
    return _retaining(training, ratio_of(_needed(gating), ()), RetainChannels(keep_up, change_magnitude), density)


@_stateless
def active_channels(*, training: Training, gating: Gating | None, density: float = 1.0) -> Client:
    """Control of adaptive pruning: retains every channel that was on for any sample, which is nearly all of them.

    Args:
        training, gating, density: see `adaptive_pruning`.
    """
    return _retaining(training, ratio_of(_needed(gating), ()), retain_active, density)


@_stateless
def weight_threshold(*, training: Training, threshold: float = 1e-3) -> Client:
    """Sets small convolution weights to zero after each local epoch and uploads the others.

    The rule of the authors' second code for arXiv 2106.06921. Its uploads were dense and its zeros entered the mean;
    here a zero is not sent, and the mean of a weight is over the clients that sent it.

    Args:
        training: the config's `[training]` table.
        threshold: largest magnitude that is set to zero, at least 0.
    """
    return LocalClient(ThresholdEachEpoch(training, threshold), upload=not_zero)
