"""The capacity study: fidelity and significance as laws, and a small study that goes on where it stopped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fl_sim.bench.distillation import Grid, Row, Study, Trial, measure, numbers, pairs_of
from fl_sim.config import Experiment
from fl_sim.federation import Federation
from fl_sim.fidelity import agreement, divergence, mean_std, welch
from fl_sim.losses import Distillation
from fl_sim.models import build
from fl_sim.training import Training, evaluate, snapshot
from fl_sim.types import UserError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 50), temperature=st.sampled_from([1.0, 4.0]), shift=st.floats(-5, 5))
def test_fidelity_is_the_definition(seed: int, temperature: float, shift: float) -> None:
    student, teacher = normal(9, 5, seed=seed), normal(9, 5, seed=seed + 1)
    p, q = (functional.softmax(z.double() / temperature, 1) for z in (teacher, student))
    expected = float((p * (p / q).log()).sum(1).mean())
    assert divergence(student, teacher, temperature=temperature) == pytest.approx(expected, rel=1e-9)
    assert divergence(student + shift, student, temperature=temperature) == pytest.approx(0, abs=1e-9)
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(student, teacher, strict=True))
    assert agreement(student, teacher) == agreement(teacher, student) == pytest.approx(same / 9)
    assert agreement(student, student + shift) == 1.0
    # What the loss adds is T^2, nothing else.
    loss = Distillation(temperature, 1.0)(student, teacher, torch.zeros(9, dtype=torch.int64))
    assert float(loss) == pytest.approx(temperature**2 * expected, rel=1e-4)


def test_welch_is_welchs() -> None:
    """The two-sample example with unequal variances, by the formula: t and the Welch-Satterthwaite freedom."""
    a, b = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0]
    variances = [torch.tensor(x, dtype=torch.float64).var() / len(x) for x in (a, b)]
    t = (sum(a) / len(a) - sum(b) / len(b)) / float(sum(variances)) ** 0.5
    freedom = float(sum(variances)) ** 2 / sum(
        float(v) ** 2 / (len(x) - 1) for v, x in zip(variances, (a, b), strict=True)
    )
    # Two-sided tail of Student's t by integration.
    grid = torch.linspace(abs(t), 400, 4_000_001, dtype=torch.float64)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    tail = 2 * float(torch.trapezoid(constant * (1 + grid.square() / freedom) ** (-(freedom + 1) / 2), grid))
    assert welch(a, b) == pytest.approx(tail, rel=1e-4)
    assert welch(b, a) == pytest.approx(welch(a, b))
    assert welch(a, [x + 100 for x in a]) < 1e-6
    assert math.isnan(welch([1.0], b))
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert welch([1.0, 1.0], [2.0, 2.0]) == 0.0


def test_mean_and_sample_deviation() -> None:
    assert mean_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_std([5.0])[1])


def experiment(*overrides: str) -> Experiment:
    options = ["data.source=digits", "data.augment=none", "model.width=0.25", "training.epochs=1"]
    return Experiment.load("configs/kd_capacity.toml", [*options, "training.precision=float32", *overrides])


def test_a_study_chooses_on_validation_tests_once_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    trained: list[Trial] = []

    def study() -> list[Row]:
        return measure(
            experiment(),
            pairs=[("resnet14", "resnet8")],
            seeds=[0, 1],
            grid=Grid(alphas=[0.3, 0.9], temperatures=[2.0]),
            teacher_epochs=2,
            folder=tmp_path,
            on_trial=trained.append,
        )

    rows = study()
    # The teacher; the student alone and under two settings of two methods; the second seed of the three that count.
    assert len(trained) == 1 + 1 + 2 * 2 + 3
    assert sum(trial.seed == 1 for trial in trained) == 3
    assert [row.method for row in rows] == ["teacher", "baseline", "logit", "feature"]
    teacher, baseline, logit, feature = rows
    assert teacher.agreement == 100.0
    assert teacher.kl_1 == pytest.approx(0, abs=1e-9)
    assert (baseline.gain, baseline.effect) == (0.0, "none shown")
    size = sum(p.numel() for p in build("resnet8", in_channels=1, width=0.25).parameters())
    assert {row.params for row in (baseline, logit, feature)} == {size}
    trained.clear()
    assert str(study()) == str(rows)
    assert trained == []


def test_the_chosen_setting_is_the_best_on_validation(tmp_path: Path) -> None:
    federation = Federation.build(experiment())
    study = Study(federation, tmp_path)
    teacher = Trial("resnet8", 0, Training(lr=0.1, epochs=2))
    trials = [Trial("resnet8", 0, Training(lr=0.1), teacher, Distillation(2.0, alpha)) for alpha in (0.1, 0.9)]
    scores = [100 * evaluate(study.model(trial), federation.data.validation)["accuracy"] for trial in trials]
    assert [study.validation(trial) for trial in trials] == scores
    assert len({study.file(trial) for trial in [*trials, teacher]}) == 3


def test_wrong_options_are_refused() -> None:
    assert pairs_of("resnet56-resnet20, resnet20-resnet8") == [("resnet56", "resnet20"), ("resnet20", "resnet8")]
    for wrong in ("resnet56", "resnet56-resnet21", "a-b-c", ""):
        with pytest.raises(UserError, match="TEACHER-STUDENT"):
            pairs_of(wrong)
    assert numbers("--seeds", "0, 1", int) == [0, 1]
    with pytest.raises(UserError, match="--alphas 'x'"):
        numbers("--alphas", "x", float)


@pytest.mark.parametrize("name", ["resnet18", "resnet18_imagenet_stem"])
def test_stems(name: str) -> None:
    """Both give logits; ImageNet's sees a 32-pixel image at a quarter of the resolution in its first stage."""
    model = build(name).eval()
    sizes: list[int] = []
    model.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))  # type: ignore[union-attr]
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sizes == [32 if name == "resnet18" else 8]
    assert snapshot(model)["conv1.weight"].shape[-1] == (3 if name == "resnet18" else 7)
