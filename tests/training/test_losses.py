"""Losses as laws: limits, gradients, what reaches the teacher, what is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples
from torch import Tensor, nn
from torch.nn import functional

from fl_sim.core.types import UserError
from fl_sim.training.losses import (
    CrossEntropy,
    Distillation,
    FeatureDistillation,
    FeaturesFromTeacher,
    FromTeacher,
    Projections,
    Proximal,
    cross_entropy,
    teacher_std,
    with_features,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


class Net(nn.Module):
    """Two convolutional stages with BatchNorm and dropout, whose modes must not matter to a teacher."""

    def __init__(self, width: int, seed: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride, padding=1), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(2 * width, 4)
        source = rng(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images)).mean((2, 3)))


def test_distillation_of_tokens_is_that_of_all_positions() -> None:
    student, teacher, labels = normal(3, 5, 7), normal(3, 5, 7, seed=1), torch.arange(15) % 7
    for alpha in (0.0, 0.5):
        loss = Distillation(2.0, alpha)
        expected = loss(student.view(15, 7), teacher.view(15, 7), labels)
        assert torch.equal(loss(student, teacher, labels.view(3, 5)), expected)


BATCH = (normal(6, 1, 8, 8), torch.arange(6) % 4)


@given(
    seed=st.integers(0, 99),
    temperature=st.floats(0.5, 20),
    alpha=st.floats(0, 1),
    rows=st.integers(1, 5),
)
@settings(deadline=None, max_examples=examples(100))
def test_distillation_gradient_is_the_formula(seed: int, temperature: float, alpha: float, rows: int) -> None:
    student = normal(rows, 7, seed=seed).double().requires_grad_()
    teacher = normal(rows, 7, seed=seed + 1).double().requires_grad_()
    labels = torch.arange(rows) % 7
    Distillation(temperature, alpha)(student, teacher, labels).backward()
    own = student.detach()
    soft = (
        temperature * (functional.softmax(own / temperature, 1) - functional.softmax(teacher / temperature, 1)) / rows
    )
    hard = (functional.softmax(own, 1) - functional.one_hot(labels, 7)) / rows
    torch.testing.assert_close(student.grad, (alpha * soft + (1 - alpha) * hard).detach(), rtol=1e-6, atol=1e-9)
    assert teacher.grad is None


def test_distillation_limits() -> None:
    student, teacher, labels = normal(5, 9), normal(5, 9, seed=1), torch.arange(5)
    assert torch.equal(Distillation(alpha=0)(student, teacher, labels), functional.cross_entropy(student, labels))
    assert float(Distillation(alpha=1)(student, student, labels)) == pytest.approx(0, abs=1e-6)
    assert float(Distillation(alpha=1)(student, teacher, labels)) > 0
    # Shifting a sample's logits changes nothing; one-hot certainty of the teacher at T = 1 is cross-entropy.
    shifted = Distillation(alpha=1)(student + 3, teacher - 2, labels)
    torch.testing.assert_close(shifted, Distillation(alpha=1)(student, teacher, labels))
    certain = 1e4 * functional.one_hot(labels, 9).float()
    torch.testing.assert_close(
        Distillation(1.0, 1.0)(student, certain, labels), functional.cross_entropy(student, labels)
    )


def test_distillation_is_a_mean_over_the_batch() -> None:
    student, teacher, labels = normal(6, 5), normal(6, 5, seed=1), torch.arange(6) % 5
    parts = [Distillation()(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(Distillation()(student, teacher, labels), torch.stack(parts).mean())


def test_large_temperatures_keep_the_gradient() -> None:
    """T^2 keeps the soft gradient's size: it tends to (z_s - z_t - means) / (B K)."""
    student, teacher = normal(2, 5).double().requires_grad_(), normal(2, 5, seed=1).double()
    Distillation(1e6, 1.0)(student, teacher, torch.zeros(2, dtype=torch.int64)).backward()
    gap = student.detach() - teacher
    torch.testing.assert_close(student.grad, (gap - gap.mean(1, keepdim=True)) / 10, rtol=1e-3, atol=1e-6)


def test_feature_distillation_limits_and_formula() -> None:
    logits, labels = normal(3, 4), torch.arange(3)
    teacher = [normal(3, 8, 4, 4, seed=1), normal(3, 16, 2, 2, seed=2)]
    student = [normal(3, 8, 4, 4, seed=3), normal(3, 16, 2, 2, seed=4)]
    hard = functional.cross_entropy(logits, labels)
    assert torch.equal(FeatureDistillation(alpha=0)(logits, student, teacher, labels), hard)
    torch.testing.assert_close(FeatureDistillation(alpha=0.3)(logits, teacher, teacher, labels), 0.7 * hard)
    squared = sum(float((s - t).square().mean()) for s, t in zip(student, teacher, strict=True)) / 2
    means = [(s.mean((2, 3)), t.mean((2, 3))) for s, t in zip(student, teacher, strict=True)]
    cosine = sum(float((1 - (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()) for a, b in means) / 2
    got = FeatureDistillation(alpha=0.3, beta=0.7)(logits, student, teacher, labels)
    assert float(got) == pytest.approx(0.3 * (squared + 0.7 * cosine) + 0.7 * float(hard), rel=1e-5)


def test_no_gradient_reaches_the_teachers_features() -> None:
    student, teacher = normal(3, 8, 4, 4).requires_grad_(), normal(3, 8, 4, 4, seed=1).requires_grad_()
    for objective in (FeatureDistillation(), FeatureDistillation(scale=teacher_std)):
        objective(normal(3, 4), [student], [teacher], torch.arange(3)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_feature_scale_makes_the_unit_of_the_features_irrelevant() -> None:
    logits, labels, objective = normal(3, 4), torch.arange(3), FeatureDistillation(1.0, scale=teacher_std)
    student, teacher = normal(3, 8, 4, 4), normal(3, 8, 4, 4, seed=1)
    torch.testing.assert_close(
        objective(logits, [student], [teacher], labels), objective(logits, [50 * student], [50 * teacher], labels)
    )


def test_student_maps_are_pooled_to_the_teachers() -> None:
    logits, labels, teacher = normal(3, 4), torch.arange(3), normal(3, 8, 2, 2)
    large = teacher.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert float(FeatureDistillation(1.0)(logits, [large], [teacher], labels)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("teacher", "count"), [((64, 128, 256, 512), 348_160), ((256, 512, 1024, 2048), 1_392_640)])
def test_projection_sizes_of_cifar_resnets(teacher: tuple[int, ...], count: int) -> None:
    before = torch.random.get_rng_state()
    first, second = (Projections((64, 128, 256, 512), teacher, rng=rng(5)) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert sum(p.numel() for p in first.parameters()) == count
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    limit = (6 / (64 + teacher[0])) ** 0.5
    assert 0.9 * limit < float(first.stages[0].weight.abs().max()) <= limit  # type: ignore[union-attr]


def feature_loss(teacher: Net) -> FeaturesFromTeacher:
    projections = Projections((3, 6), (5, 10), rng=rng(1))
    return FeaturesFromTeacher(teacher, projections, stages=[("first", "first"), ("second", "second")])


@pytest.mark.parametrize("make", [FromTeacher, feature_loss])
def test_teachers_are_frozen_and_asked_in_evaluation_mode(make: Callable[[Net], Callable[..., Tensor]]) -> None:
    teacher, student = Net(5, 1, stride=2).train(), Net(3, 2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss = make(teacher)
    if isinstance(loss, nn.Module):
        loss.train()
        assert all("teacher" not in name for name, _ in [*loss.named_modules(), *loss.named_parameters()])
        assert not any(p is q for p in loss.parameters() for q in teacher.parameters())
    student.eval()
    values = [loss(student, BATCH) for _ in range(2)]
    assert torch.equal(*values)
    values[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_distilling_features_trains_the_projections_too() -> None:
    teacher, student = Net(5, 1), Net(3, 2)
    loss = feature_loss(teacher)
    parameters = [*student.parameters(), *loss.parameters()]
    assert len(list(loss.parameters())) == 2
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    values, drawn = [], [p.detach().clone() for p in loss.parameters()]
    for _ in range(30):
        student.eval()
        optimizer.zero_grad()
        value = loss(student, BATCH)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        assert float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()) <= 1 + 1e-5
        optimizer.step()
        values.append(float(value.detach()))
    assert values == sorted(values, reverse=True)
    assert not any(torch.equal(p, then) for p, then in zip(loss.parameters(), drawn, strict=True))


def test_features_are_those_of_the_named_stages_and_leave_no_hook() -> None:
    model = Net(3, 1).eval()
    logits, (second, first) = with_features(model, BATCH[0], ["second", "first"])
    assert torch.equal(logits, model(BATCH[0]))
    assert torch.equal(first, model.first(BATCH[0]))
    assert torch.equal(second, model.second(first))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match=r"'layer9'; allowed: first"):
        with_features(model, BATCH[0], ["layer9"])


def test_proximal_gradient_is_the_pull() -> None:
    model = Net(3, 1).eval()
    anchor = {name: p.detach() + 0.1 * normal(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    anchor["a.buffer"] = torch.zeros(3)
    grads = []
    for loss in (
        cross_entropy,
        Proximal(0.3, anchor),
        Proximal(0.3, anchor, loss=CrossEntropy(0.1)),
        CrossEntropy(0.1),
    ):
        model.zero_grad()
        loss(model, BATCH).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, p in model.named_parameters():
        pull = 0.3 * (p.detach() - anchor[name])
        torch.testing.assert_close(grads[1][name] - grads[0][name], pull, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads[2][name] - grads[3][name], pull, rtol=1e-4, atol=1e-6)
    assert torch.equal(Proximal(0.0, anchor)(model, BATCH), cross_entropy(model, BATCH))


def test_proximal_pulls_what_is_trained() -> None:
    model = Net(3, 1).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    anchor = {name: p.detach() for name, p in model.head.named_parameters(prefix="head")}
    assert torch.isfinite(Proximal(1.0, anchor)(model, BATCH))
    with pytest.raises(UserError, match=r"'head\.weight'"):
        Proximal(1.0, {})(model, BATCH)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Distillation(temperature=0.0),
        lambda: Distillation(alpha=1.5),
        lambda: FeatureDistillation(beta=-1.0),
        lambda: CrossEntropy(2.0),
        lambda: Proximal(-1.0, {}),
        lambda: Projections((1, 2), (1,), rng=rng()),
        lambda: FeatureDistillation()(normal(1, 2), [], [], torch.zeros(1, dtype=torch.int64)),
        lambda: FeatureDistillation()(
            normal(1, 2), [normal(1, 2, 2, 2)], [normal(1, 3, 2, 2)], torch.zeros(1, dtype=torch.int64)
        ),
    ],
)
def test_wrong_numbers_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        wrong()
