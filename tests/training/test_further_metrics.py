"""Further metrics beside their formulas, whatever the batch size; what they are not for is refused."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny
from torch import nn

from fl_sim import UserError, run
from fl_sim.data import Split
from fl_sim.report.groups import grouped
from fl_sim.report.measures import targets
from fl_sim.report.summary_numbers import passed
from fl_sim.training import evaluate, learning_task
from fl_sim.training.further_metrics import with_further
from fl_sim.training.tasks import Metric

RNG = torch.Generator().manual_seed(2)


def measured(
    task: str, outputs: torch.Tensor, labels: torch.Tensor, *names: str, batch_size: int = 7
) -> dict[str, float]:
    table = nn.Embedding.from_pretrained(outputs.flatten(1))  # a model whose answers are these
    model = nn.Sequential(table, nn.Flatten(0, 1), nn.Unflatten(1, outputs.shape[1:]))
    inputs = torch.arange(len(outputs)).view(-1, 1)
    return evaluate(model, Split(inputs, labels), with_further(learning_task(task), names), batch_size=batch_size)


def pairs(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """AUC by its meaning: the share of pairs whose positive sample has the higher score; ties count half."""
    each = [(float(p > n) + float(p == n) / 2) for p, n in product(scores[positive], scores[~positive])]
    return sum(each) / len(each)


def test_auc_of_two_classes_is_the_share_of_ordered_pairs() -> None:
    outputs, labels = torch.randn(30, 2, generator=RNG), torch.randint(2, (30,), generator=RNG)
    expected = pairs(outputs.softmax(1)[:, 1], labels == 1)
    assert measured("classification", outputs, labels, "auc")["auc"] == pytest.approx(expected)


def test_auc_of_several_classes_and_of_labels_is_the_mean_over_those_that_occur() -> None:
    outputs, labels = torch.randn(40, 5, generator=RNG), torch.randint(4, (40,), generator=RNG)
    chances = outputs.softmax(1)
    expected = sum(pairs(chances[:, k], labels == k) for k in range(4)) / 4
    assert measured("classification", outputs, labels, "auc")["auc"] == pytest.approx(expected)
    several = torch.rand(40, 5, generator=RNG) > 0.5
    several[:, 2] = True
    expected = sum(pairs(outputs[:, k], several[:, k]) for k in (0, 1, 3, 4)) / 4
    assert measured("multilabel", outputs, several, "auc")["auc"] == pytest.approx(expected)


def test_what_the_samples_do_not_define_is_left_out_and_what_diverged_is_no_number() -> None:
    assert "auc" not in measured("classification", torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), "auc")
    diverged = torch.full((4, 3), torch.inf)
    assert math.isnan(measured("classification", diverged, torch.tensor([0, 1, 2, 0]), "auc")["auc"])


@pytest.mark.parametrize("batch_size", [7, 512])
def test_top5_and_macro_f1(batch_size: int) -> None:
    outputs, labels = torch.randn(50, 8, generator=RNG), torch.randint(8, (50,), generator=RNG)
    found = measured("classification", outputs, labels, "top5", "f1", batch_size=batch_size)
    assert found["top5"] == pytest.approx(float((outputs.topk(5).indices == labels[:, None]).any(1).double().mean()))
    said = outputs.argmax(1)
    each = [
        2 * int(((said == k) & (labels == k)).sum()) / int((said == k).sum() + (labels == k).sum()) for k in range(8)
    ]
    assert found["f1"] == pytest.approx(sum(each) / 8)
    tokens, following = torch.randn(6, 9, 8, generator=RNG), torch.randint(8, (6, 9), generator=RNG)
    expected = float((tokens.topk(5).indices == following[..., None]).any(2).double().mean())
    assert measured("next_token", tokens, following, "top5")["top5"] == pytest.approx(expected)


def test_server_and_clients_measure_them_and_reports_know_them(tmp_path: Path) -> None:
    report = run_tiny(
        tmp_path, "model.name=mlp", "training.steps=10", "evaluate.clients=4", 'evaluate.metrics=["auc", "top5"]'
    )
    last = report.rounds[-1]
    for name in ("auc", "top5"):
        assert 0.5 < last["accuracy"] < last[name] < 1
        assert last["accuracy"] < last[f"validation_{name}"] <= 1
        assert last[f"clients_{name}_min"] <= last[f"clients_{name}"] <= last[f"clients_{name}_max"]
        assert report.results.metrics[name] == last[name]


def test_megabytes_to_a_level_of_a_metric_that_goes_down(tmp_path: Path) -> None:
    asked = ("task=regression", "data.source=diabetes", "data.partition=iid", "data.clients=5", "model.name=mlp")
    report = run_tiny(tmp_path, *asked, "training.lr=0.05", "rounds=4")
    summary, metric = report.results, Metric("rmse", higher=False)
    values = [row["rmse"] for row in report.rounds]
    assert values[-1] < values[0]
    assert not summary.bytes_to_accuracy
    assert list(summary.bytes_to_metric) == [f"{x:g}" for x in passed(metric, report.rounds)]
    for level, size in summary.bytes_to_metric.items():
        first = next(row for row in report.rounds if row["rmse"] <= float(level))
        assert size == first["uplink_bytes"] + first["downlink_bytes"]
    groups = grouped([report])
    hardest = targets(groups)[-1]
    assert hardest.name == f"to {min(map(float, summary.bytes_to_metric)):g}"
    assert hardest.spread(groups[0]).mean == pytest.approx(min(summary.bytes_to_metric.items(), key=lambda e: float(e[0]))[1] / 1e6)  # type: ignore[operator]  # fmt: skip


def test_levels_are_the_same_for_every_run() -> None:
    down, share = Metric("perplexity", higher=False), Metric("f1", higher=True, percent=True)
    assert passed(down, [{"perplexity": value} for value in (12.0, 9.5, math.nan, 7.9)]) == [8.0, 9.0, 10.0, 11.2]
    assert passed(down, [{"perplexity": 3.0}]) == []
    assert passed(share, [{"f1": 0.31}, {"f1": 0.52}]) == [0.35, 0.4, 0.45, 0.5]
    assert passed(Metric("r", higher=True), [{"r": -3.0}, {"r": 0.0}]) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (['evaluate.metrics=["aux"]'], "'aux': allowed for targets that are one class each, int64 (N,): auc, top5, f1"),
        (
            ["task=regression", 'evaluate.metrics=["auc"]', "data.source=diabetes"],
            "'auc': allowed for targets that are numbers",
        ),
        (['evaluate.metrics=["top5"]', "data.source=wine", "model.name=mlp"], "'top5': 3 classes; needed: at least 6"),
    ],
)
def test_metrics_that_say_nothing_are_refused(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tiny(tmp_path, *overrides))
    assert words in str(caught.value)
