"""Federations of a table, of tokens and of numbers: the same bits on every engine, metrics by their own name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import one_ray
import pytest
import torch
from federation import same

from fl_sim import Experiment, Report, UserError, run
from fl_sim.data import Data
from fl_sim.report.groups import grouped
from fl_sim.report.headline import headline
from fl_sim.report.measures import score_of
from fl_sim.simulation.federation import Federation
from fl_sim.training import evaluate, learning_task
from fl_sim.training.model_file import read_model

SMALL = ("rounds=2", "cohort.size=3", "training.steps=2", "workers.count=2")
TASKS: Mapping[str, Sequence[str]] = {
    "table_classes": ("client.target=clients.presets:topk", "evaluate.clients=2", "evaluate.fit=20"),
    "table_numbers": ("evaluate.clients=2",),
    "text_lstm": ("model.width=0.125", "data.context=32", "data.clients=8", "evaluate.clients=2", "evaluate.every=1"),
    "text_transformer": ("model.width=0.25", "data.context=16", "data.clients=4"),
}


def experiment(config: str, out: Path, *overrides: str) -> Experiment:
    return Experiment.load(f"configs/{config}.toml", [*SMALL, *TASKS[config], f'out="{out}"', *overrides])


@pytest.mark.parametrize("config", ["table_classes", "table_numbers", "text_lstm"])
def test_inline_and_workers_end_in_the_same_bits(config: str, tmp_path: Path) -> None:
    one = run(experiment(config, tmp_path / "inline"))
    other = run(experiment(config, tmp_path / "workers", "engine=workers"))
    same(one, other)


KEYS = ("warmup=1", "decay=cosine", "accumulate=2", "drop_last=true", "momentum=0.9", "epochs=2")
LONGER: Mapping[str, Sequence[str]] = {
    "quickstart": ("data.class_weights=balanced", "data.clients=10"),
    "table_classes": ("data.class_weights=balanced", "evaluate.clients=2"),
    "table_numbers": ("training.batch_size=3",),
    "text_transformer": ("model.width=0.25", "data.context=32", "data.clients=16", "training.optimizer=sgd"),
}
"""Config -> what makes it small, and keys of its own."""


@pytest.fixture(scope="module")
def one_start_of_ray() -> Iterator[None]:
    one_ray.start("ray")
    yield
    one_ray.end()


@pytest.mark.slow
@pytest.mark.parametrize("config", LONGER)
def test_every_engine_ends_in_the_same_bits_with_all_keys_of_training(
    config: str, tmp_path: Path, one_start_of_ray: None
) -> None:
    asked = ["rounds=3", "cohort.size=4", *LONGER[config], *(f"training.{key}" for key in KEYS)]
    runs = {
        engine: run(
            Experiment.load(
                f"configs/{config}.toml",
                [*asked, f"engine={engine}", "workers.count=2", "ray.workers=2", f'out="{tmp_path / engine}"'],
            )
        )
        for engine in ("inline", "workers", "ray")
    }
    same(runs["inline"], runs["workers"])
    same(runs["inline"], runs["ray"])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run(experiment("text_lstm", tmp_path_factory.mktemp("text")))


def test_perplexity_is_what_rounds_summary_and_report_say(text: Report) -> None:
    last = text.rounds[-1]
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    assert text.summary["accuracy"] is None
    assert text.summary["bytes_to_accuracy"] == {}
    metric = text.results.score
    assert (metric.name, metric.higher, metric.final) == ("perplexity", False, last["perplexity"])
    validation = [row["validation_perplexity"] for row in text.rounds]
    best = min(range(len(validation)), key=validation.__getitem__)
    assert metric.best_by_validation == text.rounds[best]["perplexity"]
    assert f"test perplexity {last['perplexity']:.2f}" in repr(text)
    page = (text.folder / "report.html").read_text()
    assert "Perplexity by traffic" in page
    assert "accuracy" not in page.partition("<body")[2].partition("plotly.js")[0].lower()
    assert f"reached {np.mean([row['perplexity'] for row in text.rounds]):.2f} test perplexity" in headline(
        grouped([text])
    )


def test_the_saved_model_is_the_measured_one(text: Report) -> None:
    model, data = read_model(text.folder / "model.safetensors"), load_as(text)
    assert evaluate(model, data.test, learning_task("next_token"))["perplexity"] == text.rounds[-1]["perplexity"]


def load_as(report: Report) -> Data:
    return Federation.build(Experiment.load(report.folder / "config.toml"), quiet=True).data


def test_a_lower_perplexity_is_the_better_one(text: Report) -> None:
    worse = replace(text, summary=json.loads(json.dumps(dict(text.summary))))
    worse.summary["metric"] |= {"final": 99.0, "last10_mean": 99.0}  # type: ignore[operator, index]
    worse.summary["name"] = "worse"  # type: ignore[index]
    groups = grouped([text, worse])
    assert score_of(groups).name == "perplexity"
    assert "lost" in headline(groups) or "differs by" in headline(groups)


def test_runs_of_two_tasks_are_not_compared(text: Report, tmp_path: Path) -> None:
    table = run(experiment("table_numbers", tmp_path))
    with pytest.raises(UserError, match=r"is measured by perplexity, .* is measured by rmse; needed: runs of one task"):
        headline(grouped([text, table]))


def test_a_stopped_run_of_another_metric_goes_on(text: Report, tmp_path: Path) -> None:
    run(experiment("text_lstm", tmp_path, "rounds=1"))
    longer = run(experiment("text_lstm", tmp_path), resume=False, fresh=True)
    assert longer.summary["params_sha256"] == text.summary["params_sha256"]


def test_clients_of_a_natural_partition_evaluate_on_their_own_groups() -> None:
    federation = Federation.build(Experiment.load("configs/text_lstm.toml"), quiet=True)
    train, test = federation.data.train.groups, federation.data.test.groups
    assert train is not None
    assert test is not None
    for positions, own in zip(federation.partitions, federation.own_tests, strict=True):
        assert set(test[own].tolist()) == set(train[positions].tolist())
    assert sum(map(len, federation.own_tests)) == len(test)


def no_test_of_two(validation: float = 0.1) -> Data:
    rows, groups = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32), np.arange(60) % 3
    classes = np.arange(60) % 2
    test = groups < 2
    return Data.of(
        rows,
        classes,
        groups=groups,
        test_inputs=rows[test],
        test_targets=classes[test],
        test_groups=groups[test],
        validation=validation,
    )


def tree(**data: object) -> dict[str, object]:
    return {
        "rounds": 1,
        "data": {"source": f"{__name__}:no_test_of_two", "partition": "natural", "clients": 3, **data},
        "model": {"name": "linear"},
        "cohort": {"size": 2},
    }


def test_a_group_without_a_test_sample_is_one_line_before_round_1(tmp_path: Path) -> None:
    asked = Experiment.from_tree(tree(), [f'out="{tmp_path}"', "evaluate.clients=1"])
    with pytest.raises(UserError, match="1 of 3 clients have no test sample, the first of them that of group '2'"):
        run(asked)


def test_without_a_validation_set_nothing_is_chosen(tmp_path: Path) -> None:
    report = run(Experiment.from_tree(tree(validation=0), [f'out="{tmp_path}"']))
    assert not [name for name in report.rounds[-1] if name.startswith("validation")]
    assert report.results.score.best_by_validation is None
    with pytest.raises(UserError, match=r"model.statistics = 'local': the server measures them on validation"):
        Experiment.from_tree(tree(validation=0), ["model.statistics=local"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=regression"], "needs numbers, float32 (N,) or (N, K); data.source = 'breast_cancer' has int64"),
        (["task=regresion"], "task = 'regresion': unknown; did you mean 'regression'?"),
        (["data.augment=crop_flip"], "data.augment = 'crop_flip': is for images; inputs are float32"),
        (["data.noise=10"], "data.noise: the inputs are float32 (410, 30); allowed: images"),
        (["model.name=cnn_bn"], "model.name = 'cnn_bn': is for images"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_table_is_one_line(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(experiment("table_classes", tmp_path, *overrides))
    assert words in str(caught.value)


@pytest.mark.parametrize("client", ["distillation", "fedavg", "feature_distillation"])
def test_a_loss_of_class_scores_needs_a_classification(client: str, tmp_path: Path) -> None:
    option = ["client.label_smoothing=0.1"] if client == "fedavg" else []
    tokens = " or 'next_token'" if client == "distillation" else ", not"
    with pytest.raises(
        UserError, match="its loss compares scores of classes; allowed: task = 'classification'" + tokens
    ):
        run(experiment("table_numbers", tmp_path, f"client.target=clients.presets:{client}", *option))


def test_the_cohort_engine_trains_a_table_as_one_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = run(experiment("table_numbers", tmp_path / "inline"))
    other = run(experiment("table_numbers", tmp_path / "cohort", "engine=cohort"))
    assert "client by client" not in caplog.text
    assert all(torch.allclose(one.params[name], other.params[name], atol=1e-6) for name in one.params)


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def signals() -> Data:
    waves, targets = drawn(80, 3, 16), drawn(80, 2)
    return Data.of(waves, targets, test_inputs=waves[:20], test_targets=targets[:20])


def several_labels() -> Data:
    rows = drawn(80, 6)
    return Data.of(rows, rows[:, :2] > 0, test_inputs=rows[:20], test_targets=rows[:20, :2] > 0)


def sequences_with_a_class() -> Data:
    tokens = (9 * np.abs(drawn(80, 12))).astype(np.int64) % 9
    classes = (tokens[:, 0] > 4).astype(np.int64)
    return Data.of(tokens, classes, test_inputs=tokens[:20], test_targets=classes[:20], vocabulary=9)


@pytest.mark.parametrize(
    ("source", "task", "model", "metric"),
    [
        ("signals", "regression", "mlp", "rmse"),
        ("several_labels", "multilabel", "linear", "f1"),
        ("sequences_with_a_class", "classification", "transformer", "accuracy"),
    ],
)
def test_every_kind_of_inputs_and_targets_trains(
    source: str, task: str, model: str, metric: str, tmp_path: Path
) -> None:
    asked = [f"task={task}", f"model.name={model}", f"data.source={__name__}:{source}", "data.partition=iid"]
    report = run(experiment("table_classes", tmp_path, *asked, "data.clients=4"))
    assert report.results.score.name == metric
    assert np.isfinite(report.rounds[-1][metric])
    assert report.summary["failures"] == dict.fromkeys(report.summary["failures"], 0)  # type: ignore[call-overload]
