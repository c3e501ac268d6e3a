"""The capacity study: fidelity and significance as laws, and a small study that goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from unfilled import unfilled

from fl_sim.bench.capacity_study import Row, Study, Trial, folder, longer, measure
from fl_sim.bench.fidelity import agreement, divergence, mean_std, welch
from fl_sim.cli import main
from fl_sim.config import Experiment
from fl_sim.core.types import UserError
from fl_sim.models import build
from fl_sim.simulation.federation import Federation
from fl_sim.training import Training, evaluate
from fl_sim.training.feature_loss import feature_loss
from fl_sim.training.losses import Distillation, FeatureDistillation


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
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


SMALL = [
    "data.source=digits",
    "data.augment=none",
    "model.width=0.25",
    "training.epochs=1",
    "training.batch_size=256",
    "training.precision=float32",
]
PAIR = 'study.pairs=[["resnet14", "resnet8"]]'
GRID = [PAIR, "study.alphas=[0.3, 0.9]", "study.temperatures=[2.0]"]


def experiment(*overrides: str) -> Experiment:
    return Experiment.load("configs/kd_capacity.toml", [*SMALL, *overrides])


def test_a_study_chooses_on_validation_tests_once_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    trained: list[Trial] = []

    def study(*seeds: int) -> list[Row]:
        return measure(experiment(*GRID, f'out="{tmp_path}"'), seeds=seeds, on_trial=trained.append)

    study(0)
    # The teacher; the student alone and under two settings of two methods.
    assert len(trained) == 1 + 1 + 2 * 2
    rows = study(0, 1)
    # The second seed of the three that count.
    assert [trial.seed for trial in trained[6:]] == [1] * 3
    assert [row.method for row in rows] == ["teacher", "baseline", "logit", "feature"]
    assert [row.seeds for row in rows] == [1, 2, 2, 2]
    teacher, baseline, logit, feature = rows
    assert teacher.agreement == 100.0
    assert teacher.kl_1 == pytest.approx(0, abs=1e-9)
    assert (baseline.gain, baseline.effect) == (0.0, "none shown")
    size = sum(p.numel() for p in build("resnet8", in_channels=1, width=0.25).parameters())
    assert {row.params for row in (baseline, logit, feature)} == {size}
    trained.clear()
    assert str(study(0, 1)) == str(rows)
    assert trained == []


def test_a_sweep_of_a_config_with_a_study_makes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fl-sim", "sweep", "configs/kd_capacity.toml", *SMALL, PAIR, "study.alphas=[0.5]"]
    options = ["study.temperatures=[2.0]", "study.beta=0.1,0.5", "--seeds", "0,1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert "resnet14-resnet8" in said.out
    tables = sorted(folder(experiment(f'out="{tmp_path}"')).glob("table-*.json"))
    assert len(tables) == 2
    rows = [json.loads(table.read_text())["rows"] for table in tables]
    assert {row["setting"] for table in rows for row in table if row["method"] == "feature"} == {
        "alpha 0.5 beta 0.1",
        "alpha 0.5 beta 0.5",
    }
    # What both tables share was trained once: the teacher, and two seeds of the baseline, the logits and either beta.
    assert said.err.count("Trial(model='resnet8'") == 2 + 2 + 2 * 2


def test_teachers_train_longer() -> None:
    assert longer(Training(epochs=30), 2.0) == Training(epochs=60)
    assert longer(Training(steps=100), 1.5) == Training(steps=150)


def test_the_chosen_setting_is_the_best_on_validation(tmp_path: Path) -> None:
    federation = Federation.build(experiment())
    study = Study(federation, tmp_path)
    teacher = Trial("resnet8", 0, Training(lr=0.1, epochs=2))
    trials = [Trial("resnet8", 0, Training(lr=0.1), teacher, Distillation(2.0, alpha)) for alpha in (0.1, 0.9)]
    scores = [100 * evaluate(study.model(trial), federation.data.validation)["accuracy"] for trial in trials]
    assert [study.validation(trial) for trial in trials] == scores
    assert len({study.file(trial) for trial in [*trials, teacher]}) == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('study.pairs=[["resnet56", "resnet21"]]', r"study\.pairs = 'resnet21'.*did you mean 'resnet2"),
        ('study.pairs=[["resnet56"]]', r"study\.pairs"),
        ("study.pairs=[]", r"study\.pairs"),
        ("study.alphas=[1.5]", r"study\.alphas"),
        ("study.temperatures=[0]", r"study\.temperatures"),
        ("study.pair=1", "did you mean 'pairs'"),
    ],
)
def test_wrong_studies_are_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        measure(experiment(override), seeds=[0])
    with pytest.raises(UserError, match="--seeds 0,0"):
        measure(experiment(), seeds=[0, 0])


@pytest.mark.parametrize("stem", ["", "_imagenet_stem"])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_stems(name: str, stem: str) -> None:
    """Both give logits; ImageNet's sees a 32-pixel image at a quarter of the resolution in its first stage."""
    sizes: list[int] = []
    with unfilled(), torch.no_grad():
        model = build(name + stem).eval()
        model.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))  # type: ignore[union-attr]
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sizes == [8 if stem else 32]
    assert model.conv1.weight.shape[-1] == (7 if stem else 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(("teacher", "count"), [("resnet34", 348_160), ("resnet50", 1_392_640)])
def test_the_papers_pairs_have_the_papers_projections(teacher: str, count: int) -> None:
    """Basic blocks to basic blocks, and to bottlenecks, with the widths that the models themselves show."""
    rng, image = torch.Generator().manual_seed(0), torch.zeros(1, 3, 32, 32)
    with unfilled():
        student, larger = build("resnet18"), build(teacher)
    loss = feature_loss(student, larger, image, objective=FeatureDistillation(), rng=rng)
    assert sum(parameter.numel() for parameter in loss.parameters()) == count
