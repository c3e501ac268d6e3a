"""Teachers: who they are, what they cost, what is trained beside the student and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from federation import run_tiny
from torch import Tensor, nn

from clients.distillation import LearnFeatures, LearnLogits, received
from clients.local import OWN, LocalClient
from clients.presets import feature_distillation
from fl_sim import Report
from fl_sim.core.types import Task, UserError
from fl_sim.data import load as load_data
from fl_sim.models import build, stage_names
from fl_sim.training import CLIPS, Training, local_sgd, snapshot
from fl_sim.training.client import ClientContext
from fl_sim.training.losses import (
    Distillation,
    FeatureDistillation,
    FeaturesFromTeacher,
    FromTeacher,
    cross_entropy,
    teacher_std,
)

LOGITS = "client.target=clients.presets:distillation"
FEATURES = "client.target=clients.presets:feature_distillation"
STAGES = 'client.stages=["2", "5", "8"]'


def context(model: str = "resnet8", seed: int = 0) -> tuple[Task, ClientContext]:
    """A task of round 2 and a client with 64 digits."""
    data = load_data("digits").train
    net = build(model, in_channels=1, image_size=8, width=0.25)
    rng = torch.Generator().manual_seed(seed)
    ctx = ClientContext(net, data.subset(torch.arange(64).numpy()), rng, seed=seed)
    return Task(2, snapshot(net)), ctx


@pytest.mark.parametrize("options", [[LOGITS], [FEATURES, STAGES]], ids=["logits", "features"])
def test_a_teacher_without_weight_is_fedavg_and_any_teacher_costs_no_byte(
    tmp_path: Path, finished: Callable[..., Report], options: list[str]
) -> None:
    fedavg = finished()
    unweighted = run_tiny(tmp_path / "zero", *options, "client.alpha=0.0")
    weighted = run_tiny(tmp_path / "half", *options, "client.alpha=0.5")
    assert unweighted.summary["params_sha256"] == fedavg.summary["params_sha256"]
    assert weighted.summary["params_sha256"] != fedavg.summary["params_sha256"]
    assert weighted.ledger.to_table().select(["payload_bytes"]) == fedavg.ledger.to_table().select(["payload_bytes"])
    assert weighted.summary["params"] == fedavg.summary["params"]
    # The seeded model of round 1 is random: nobody learns from it.
    assert weighted.rounds[0]["train_loss"] == fedavg.rounds[0]["train_loss"]


def test_the_teacher_is_the_model_as_received_and_stays_so() -> None:
    task, ctx = context()
    assert received(Task(1, task.params), ctx) is None
    loss = LearnLogits(Distillation())(task, ctx)
    assert isinstance(loss, FromTeacher)
    ctx.model.train()
    local_sgd(ctx.model, ctx.data, loss, lr=0.1, epochs=2, rng=ctx.rng)
    for name, value in snapshot(loss.teacher).items():
        assert torch.equal(value, task.params[name]), name
    assert not any(module.training for module in loss.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in loss.teacher.parameters())
    assert any(not torch.equal(value, task.params[n]) for n, value in snapshot(ctx.model).items())


def test_identical_teacher_pulls_nowhere() -> None:
    """At the received parameters, a student in evaluation mode gets no gradient from its own logits."""
    task, ctx = context()
    loss = LearnLogits(Distillation(alpha=1.0))(task, ctx)
    ctx.model.eval()
    images, labels = next(ctx.data.batches(32))
    loss(ctx.model, (images, labels)).backward()
    assert max(float(p.grad.abs().max()) for p in ctx.model.parameters() if p.grad is not None) < 1e-6


def test_projections_are_trained_kept_and_never_sent() -> None:
    task, ctx = context()
    client = feature_distillation(training=Training(lr=0.1))
    update = client(task, ctx)
    kept = {name: value.clone() for name, value in ctx.state.items()}
    channels = (4, 8, 16)
    assert [tuple(v.shape) for v in kept.values()] == [(c, c, 1, 1) for c in channels]
    assert all(name.startswith(OWN) for name in kept)
    assert update.params.keys() == task.params.keys()
    # The next round goes on where this one ended: a step too small to see changes nothing.
    feature_distillation(training=Training(lr=1e-30))(task, ctx)
    assert all(torch.equal(ctx.state[name], value) for name, value in kept.items())
    client(task, ctx)
    assert not any(torch.equal(ctx.state[name], value) for name, value in kept.items())


def test_a_fresh_client_draws_its_projections_from_its_own_seed() -> None:
    losses = [LearnFeatures(FeatureDistillation())(*context(seed=seed)) for seed in (0, 0, 1)]
    first, second, other = ([*loss.parameters()] for loss in losses if isinstance(loss, FeaturesFromTeacher))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


class Steep(nn.Module):
    """A loss whose own parameter has a gradient of 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(()))

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model, batch) + 1000 * self.own


@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_covers_the_union_and_the_published_bug_does_not(clip: str) -> None:
    """With plain SGD at lr 1, the step taken is the clipped gradient."""
    task, ctx = context()
    loss = Steep()
    local_sgd(ctx.model, ctx.data, loss, lr=1.0, steps=1, batch_size=64, clip_norm=0.1, clip=clip)
    student = torch.cat([(p.detach() - task.params[n]).flatten() for n, p in ctx.model.named_parameters()])
    own = loss.own.detach().reshape(1)
    norm = float(torch.cat([student, own]).norm())
    if clip == "union":
        assert norm == pytest.approx(0.1, rel=1e-3)
        assert float(student.norm()) < 1e-3
    else:
        assert float(own) == pytest.approx(-1000)
        assert float(student.norm()) == pytest.approx(0.1, rel=1e-3)


def test_stages_are_the_residual_ones_or_must_be_named() -> None:
    assert stage_names(build("resnet8")) == ["layer1", "layer2", "layer3"]
    task, ctx = context("cnn_bn")
    with pytest.raises(UserError, match=r"no layer1.*allowed: 0, 1"):
        LocalClient(Training(), loss=LearnFeatures(FeatureDistillation()))(task, ctx)


def test_unknown_clipping_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.clip = 'projections'.*union, model"):
        Training(clip="projections")


def test_the_unit_of_the_features_is_a_choice() -> None:
    make = feature_distillation(training=Training(), scale="teacher_std")
    assert make.loss.objective.scale is teacher_std  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"client\.scale = 'std'"):
        feature_distillation(training=Training(), scale="std")
