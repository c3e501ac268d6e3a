"""Weights of samples and classes: the loss that a formula says, the mean over clients where asked for, or one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_sim import Experiment, Report, Update, UserError, load, local_sgd, run, snapshot
from fl_sim.core.types import Task
from fl_sim.data import Data, Split
from fl_sim.data import load as load_data
from fl_sim.data.table import Columns
from fl_sim.data.weights import WeightedBatch
from fl_sim.training import TASKS, ClientContext, Training
from fl_sim.training.losses import CrossEntropy, Distillation, FromTeacher, Proximal, cross_entropy

RNG = torch.Generator().manual_seed(0)
WEIGHTS = torch.rand(6, generator=RNG) + 0.1
CASES = {
    "classification": (torch.randn(6, 3, generator=RNG), torch.arange(6) % 3),
    "regression": (torch.randn(6, 2, generator=RNG), torch.randn(6, 2, generator=RNG)),
    "multilabel": (torch.randn(6, 3, generator=RNG), torch.randn(6, 3, generator=RNG) > 0),
    "next_token": (torch.randn(6, 4, 3, generator=RNG), torch.randint(3, (6, 4), generator=RNG)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_weighted_mean_of_the_samples_losses(name: str) -> None:
    outputs, targets = CASES[name]
    task, model = TASKS[name], nn.Identity()
    each = [task(model, (outputs[i : i + 1], targets[i : i + 1])) for i in range(6)]
    expected = sum(w * loss for w, loss in zip(WEIGHTS, each, strict=True)) / WEIGHTS.sum()
    torch.testing.assert_close(task(model, WeightedBatch(outputs, targets, WEIGHTS)), expected)


def test_class_weights_are_those_of_pytorch() -> None:
    outputs, targets = CASES["classification"]
    of_each = torch.tensor([0.5, 2.0, 1.0])
    batch = WeightedBatch(outputs, targets, of_each[targets])
    expected = nn.CrossEntropyLoss(weight=of_each)(outputs, targets)
    for loss in (cross_entropy, CrossEntropy(), Proximal(0.0, {}, cross_entropy)):
        torch.testing.assert_close(loss(nn.Identity(), batch), expected)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    same = WeightedBatch(outputs, targets, torch.full((6,), 3.0))
    torch.testing.assert_close(CrossEntropy(0.1)(nn.Identity(), same), smooth(outputs, targets))


def rows(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    return drawn, (np.arange(count) % 4 == 0).astype(np.int64)


def split(weights: Tensor | None) -> Split:
    inputs, classes = rows()
    return Split(torch.from_numpy(inputs), torch.from_numpy(classes), weights=weights)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "batch_size": 10}])
def test_a_sample_of_weight_two_is_the_sample_twice(options: dict[str, int]) -> None:
    """In one batch, whatever its parts."""
    twice, weighed = net(), net()
    positions = np.concatenate([np.arange(40), np.arange(7)])
    training = Training(lr=0.5, batch_size=64, steps=3)
    expected = training.fit(twice, split(None).subset(positions))
    weights = torch.ones(40)
    weights[:7] = 2
    made = (
        replace(training, batch_size=40, **options) if not options else replace(training, accumulate=4, batch_size=10)
    )
    metrics = made.fit(weighed, split(weights), rng=torch.Generator().manual_seed(1))
    assert metrics["loss"] == pytest.approx(expected["loss"])
    assert metrics["examples"] == 120
    for name, value in snapshot(weighed).items():
        torch.testing.assert_close(value, snapshot(twice)[name])


def test_a_loss_that_ignores_weights_is_refused() -> None:
    for loss in (FromTeacher(net(), Distillation()), lambda model, batch: model(batch[0]).sum()):
        with pytest.raises(
            UserError, match=r"does not use the samples' weights; needed: ctx.loss, or a loss with weighs = True"
        ):
            Training().fit(net(), split(torch.ones(40)), loss)


def weighted() -> Data:
    inputs, classes = rows(120)
    groups = np.repeat(np.arange(3), 40)
    return Data.of(
        inputs, classes, test_inputs=inputs, test_targets=classes, groups=groups, weights=1.0 + groups, validation=0.1
    )


def test_weights_have_mean_1_over_the_training_part() -> None:
    data = weighted()
    assert data.train.weights is not None
    assert data.validation.weights is data.test.weights is None
    assert float(data.train.weights.mean()) == pytest.approx(1)
    by_group = [float(data.train.weights[data.train.groups == g].mean()) for g in range(3)]
    assert np.array(by_group) / by_group[0] == pytest.approx([1, 2, 3])
    balanced = data.with_class_weights("balanced").train
    sums = [float((balanced.weights / data.train.weights)[balanced.labels == c].sum()) for c in (0, 1)]
    assert sums[0] == pytest.approx(sums[1])


def own_loop(task: Task, ctx: ClientContext) -> Update:
    model = load(ctx.model, task.params)
    metrics = local_sgd(model, ctx.data, ctx.loss, lr=0.1, batch_size=8, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples, metrics={**metrics, "counted": ctx.num_examples})


def federated(out: Path, *overrides: str) -> Report:
    tree: dict[str, object] = {
        "rounds": 1,
        "data": {"source": f"{__name__}:weighted", "partition": "natural", "clients": 3},
        "model": {"name": "linear"},
        "cohort": {"size": 3},
        "training": {"batch_size": 8},
        "workers": {"count": 1},
    }
    return run(Experiment.from_tree(tree, [f'out="{out}"', *overrides]))


def test_engines_weigh_alike_and_clients_count_by_choice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inline, *others = (
        federated(tmp_path / engine, "data.class_weights=balanced", f"engine={engine}")
        for engine in ("inline", "workers", "cohort")
    )
    assert {r.summary["params_sha256"] for r in others} == {inline.summary["params_sha256"]}
    assert sum("client by client here: weights of samples" in r.getMessage() for r in caplog.records) == 1
    caplog.clear()
    plain = federated(tmp_path / "own", f"client={__name__}:own_loop")
    assert plain.rounds[-1]["train_counted"] == 36
    assert sum("weights of samples count where it trains with ctx.loss" in r.getMessage() for r in caplog.records) == 1
    counted = federated(tmp_path / "counted", f"client={__name__}:own_loop", "data.weigh_clients=true")
    # Of weights 1, 2 and 3 the mean is 2: clients count 18, 36 and 54 thousands.
    assert counted.rounds[-1]["train_counted"] == pytest.approx((18**2 + 36**2 + 54**2) / 108 * 1000, rel=1e-3)
    assert counted.summary["params_sha256"] != plain.summary["params_sha256"]


@pytest.mark.parametrize("method", ["fedprox", "scaffold", "feddyn", "moon"])
def test_a_loss_with_a_term_of_its_own_uses_the_weights(tmp_path: Path, method: str) -> None:
    named = [f"client.target=clients.presets:{method}"]
    if method in ("scaffold", "feddyn"):
        named.append(f"strategy.target=strategies.presets:{method}")
    even, weighed = (federated(tmp_path / w, *named, f"data.class_weights=[1.0, {w}]") for w in ("1.0", "3.0"))
    assert even.summary["params_sha256"] != weighed.summary["params_sha256"]


def negative() -> Data:
    inputs, classes = rows()
    return Data.of(
        inputs, classes, test_inputs=inputs, test_targets=classes, weights=np.where(np.arange(40) == 7, -1.0, 1.0)
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "client=clients.presets:distillation",
            "client = 'clients.presets:distillation': its loss does not use weights",
        ),
        (
            f"data.source={__name__}:negative",
            "data: weights: -1.0 of sample 7 (from 0); needed: numbers above 0, none missing",
        ),
        ("data.class_weights=[1.0]", "data.class_weights = [1.0]: needed: numbers above 0, one for each of 2 classes"),
        (
            "data.class_weights=[1.0, 0.0]",
            "data.class_weights = [1.0, 0.0]: needed: numbers above 0, one for each of 2",
        ),
        ("data.class_weights=even", "data.class_weights = 'even': allowed: 'balanced', or a list"),
    ],
)
def test_wrong_weights_are_one_line(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as said:
        federated(tmp_path, override)
    assert words in str(said.value)


def test_without_weights_clients_cannot_count_by_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.weigh_clients = true: the samples have no weights"):
        run(Experiment(data={"weigh_clients": True}, out=str(tmp_path)))
    with pytest.raises(UserError, match=r"data.class_weights: targets are float32"):
        run(Experiment(data={"source": "diabetes", "class_weights": "balanced"}, task="regression", out=str(tmp_path)))


def table(folder: Path, third: object) -> Path:
    text = "\n".join(f"{i},{i % 2},{third if i == 3 else i + 1}" for i in range(30))
    (folder / "t.csv").write_text(f"x,y,w\n{text}\n")
    return folder / "t.csv"


def test_a_column_of_a_table_holds_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))
    columns = Columns(target=("y",), weight="w")
    train = load_data(str(table(tmp_path, 4)), columns=columns).train
    assert train.shape == (1,)
    weights = train.stored[:, 0] + 1
    torch.testing.assert_close(train.weights, weights / weights.mean())
    with pytest.raises(UserError, match=r"data.weight: 'w' is -2 in row 3 \(from 0\); needed: numbers above 0"):
        load_data(str(table(tmp_path, -2)), columns=columns)
    with pytest.raises(UserError, match=r"data.weight: 'y' is an input, target or group too"):
        load_data(str(table(tmp_path, 4)), columns=replace(columns, weight="y"))
    with pytest.raises(UserError, match=r"data.weight: t.csv has no column 'v'"):
        load_data(str(table(tmp_path, 4)), columns=replace(columns, weight="v"))
