"""A run of another task than classification is nowhere told in accuracies."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from federation import run_tiny
from rich.console import Console
from torch import nn

from fl_sim import Report
from fl_sim.data import load
from fl_sim.report import (
    FORMATS,
    beside,
    comparison,
    effect,
    estimates,
    explanation,
    grouped,
    over_seeds,
    per_run,
    write_page,
)
from fl_sim.report.headline import headline

TASKS = {
    "regression": ("task=regression", "data.source=diabetes", "data.partition=iid", "model.name=linear"),
    "multilabel": (
        "task=multilabel",
        f"data.source={__name__}:labels",
        "data.partition=iid",
        "model.name=linear",
    ),
}


def labels() -> object:
    import numpy as np

    from fl_sim.data import Data

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(120, 4)).astype(np.float32)
    targets = inputs[:, :3] > 0
    return Data.of(inputs[:80], targets[:80], test_inputs=inputs[80:], test_targets=targets[80:])


@pytest.fixture(scope="module", params=TASKS)
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    out = tmp_path_factory.mktemp("runs")
    return [run_tiny(out, *TASKS[request.param], f"seed={seed}", "rounds=1") for seed in (0, 1)]


def test_no_text_says_accuracy(reports: list[Report], tmp_path: Path) -> None:
    groups, text = grouped(reports), io.StringIO()
    console = Console(file=text, width=200)
    for table in (comparison(reports), over_seeds(groups), per_run(reports[0]), estimates(reports[0])):
        console.print(table)
    console.print(beside(groups, groups[0].name))
    write_page(reports, tmp_path / "page.html")
    page = re.sub(r"<script.*?</script>|<style.*?</style>", "", (tmp_path / "page.html").read_text(), flags=re.DOTALL)
    told = [*explanation(reports[0]), headline(groups), repr(reports[0]), reports[0]._repr_html_(), page]
    told += [FORMATS[name](groups, []) for name in FORMATS]
    for line in [text.getvalue(), *told]:
        assert "accura" not in line.lower(), line
    assert reports[0].results.score.name in text.getvalue()
    # A cross-entropy is in nats, a squared error is not.
    whole = (tmp_path / "page.html").read_text()
    assert ("test loss [nats]" in whole, "test loss" in whole) == (reports[0].config["task"] == "multilabel", True)


@pytest.mark.parametrize(
    ("source", "said"), [("diabetes", "test rmse without retraining: "), (f"{__name__}:labels", "test f1 without")]
)
def test_a_pruned_model_is_measured_by_its_own_metric(source: str, said: str) -> None:
    data = load(source)
    model = nn.Linear(data.shape[0], data.num_classes)
    _, line = effect(model, model, data)
    assert line.startswith(said)
