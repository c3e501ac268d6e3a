"""A smaller dense model for the same bytes: its size is computed, its accuracy is one that was measured or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from command import cli_here
from federation import run_tiny
from summaries import summary

from fl_sim import Report, UserError
from fl_sim.communication.ledger import Ledger
from fl_sim.report import require_small, small_models
from fl_sim.report.figures import front
from fl_sim.report.groups import Group, grouped
from fl_sim.report.small_models import table_of

METRIC = {"name": "accuracy", "higher": True, "percent": True, "best_by_validation": None}
ALL = {"prunable": 1.0, "model": 1.0, "uplink_mean": 1.0}


def group(
    name: str,
    accuracies: Sequence[float | None],
    megabytes: float,
    *,
    params: int,
    saving: float = 0.0,
    source: str = "digits",
) -> Group:
    """Runs of these accuracies in percent, one a seed."""
    made = []
    for seed, accuracy in enumerate(accuracies):
        told = summary(
            name=name,
            seed=seed,
            params=params,
            accuracy=None,
            metric={
                **METRIC,
                "last10_mean": None if accuracy is None else accuracy / 100,
                "final": 0.01 * (accuracy or 0),
            },
            total_bytes=round(megabytes * 1e6),
            saving=saving,
            density=ALL,
        )
        report = Report(Path(name), told, [], Ledger(), {})
        report.__dict__["config"] = {"data": {"source": source}}  # read from the folder otherwise
        made.append(report)
    return Group(name, tuple(made))


SPARSE = group("sparse", [90, 88, 92], 25, params=1_000_000, saving=0.75)
DENSE = group("dense", [95, 95, 95], 100, params=1_000_000)
HALF = group("half", [80, 81, 82], 25.5, params=240_000)
TINY = group("tiny", [85, 85, 86], 5, params=50_000)
LARGE = group("threequarters", [94, 94, 94], 26.5, params=500_000)


def test_the_size_of_the_dense_model_is_that_of_the_bytes() -> None:
    (row,) = small_models([DENSE, SPARSE])
    assert (row.group, row.params, row.width) == (SPARSE, 250_000, 0.5)
    assert (row.measured, row.beyond) == (None, None)
    assert table_of([DENSE, SPARSE])[1] == [["sparse", "25.000 ± 0.000", "250,000", "0.50", "none", "", ""]]


def test_beside_it_stands_the_best_dense_run_of_fewer_parameters_and_at_most_its_bytes() -> None:
    (row,) = small_models([LARGE, HALF, DENSE, SPARSE, TINY])
    assert row.measured == TINY
    assert row.beyond is not None
    assert row.beyond.mean == pytest.approx((5 + 3 + 6) / 3)
    (cells,) = table_of([LARGE, HALF, DENSE, SPARSE, TINY])[1]
    assert cells[:5] == ["sparse", "25.000 ± 0.000", "250,000", "0.50", "tiny"]
    assert cells[6].startswith("4.67 ±")
    assert cells[6].endswith(" points")
    (row,) = small_models([SPARSE, HALF, group("diverged", [None], 1, params=5)])
    assert row.measured == HALF


def test_runs_of_other_data_and_runs_that_leave_something_out_are_no_small_models() -> None:
    other = group("other", [99, 99, 99], 5, params=50_000, source="cifar10")
    sparse = group("small and sparse", [99, 99, 99], 5, params=50_000, saving=0.5)
    assert [row.measured for row in small_models([SPARSE, other, sparse])] == [None, None]
    with pytest.raises(UserError, match=r"--small sparse: saved 75\.0 % of its bytes"):
        require_small([SPARSE], [Path("sparse")])
    require_small([HALF, SPARSE], [Path("half")])


def test_nothing_is_said_where_nothing_is_saved() -> None:
    assert small_models([DENSE, HALF]) == []


def test_the_steps_of_the_chart_are_measured_points() -> None:
    def steps(*groups: Group) -> list[tuple[list[float], list[float]]]:
        traces = front(groups).views["linear"]["data"]
        return [(t["x"], t["y"]) for t in traces if t.get("line", {}).get("dash") == "dash"]  # type: ignore[union-attr,index,call-overload]

    ((x, y),) = steps(SPARSE, HALF, TINY, DENSE)
    assert x == pytest.approx([5, 25.5, 100])
    assert y == pytest.approx([256 / 3, 256 / 3, 95])  # half cost more than tiny and reached less
    assert steps(SPARSE, DENSE) == []


def test_compare_takes_them_and_the_page_says_how_it_was_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = run_tiny(tmp_path, "name=small", "model.name=linear")
    topk = run_tiny(tmp_path, "name=topk", "model.name=mlp", "client=clients.presets:topk", "client.density=0.1")
    (row,) = small_models(grouped([small, topk]))
    moved = topk.results.total_bytes / topk.results.dense_total_bytes
    assert row.params == round(moved * topk.results.params)
    page = tmp_path / "page.html"
    command = ["compare", str(topk.folder), "--small", str(small.folder), "--html", str(page)]
    assert cli_here(monkeypatch, *command) == 0
    assert f"{row.params:,}" in capsys.readouterr().out
    assert "No accuracy is computed" in page.read_text()
    assert cli_here(monkeypatch, "compare", str(small.folder), "--small", str(topk.folder)) == 2
    assert "needed: a run of dense float32 messages" in capsys.readouterr().err
