"""The page that every run leaves: cheap, self-contained, and drawn even where a number diverged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from federation import run_tiny, tiny

from fl_sim import Report, run
from fl_sim.report import grouped, write_report
from fl_sim.report.page import POLICY, page
from fl_sim.simulation.sweep import sweep


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tiny(tmp_path_factory.mktemp("runs"), "model.name=mlp", "evaluate.fit=20")


def charts(text: str) -> list[object]:
    """The views of every figure of a page, read as strictly as a browser does."""

    def refuse(word: str) -> object:
        raise AssertionError(f"{word} is no JSON")

    blocks = [part.split("</script>")[0] for part in text.split('<script type="application/json">')[1:]]
    return [json.loads(block, parse_constant=refuse) for block in blocks]


def test_a_run_gets_its_page(report: Report) -> None:
    (report.folder / "report.html").unlink(missing_ok=True)
    assert write_report(report) == report.folder / "report.html"
    text = (report.folder / "report.html").read_text()
    assert text.startswith("<!doctype html>")
    assert f'content="{POLICY}"'.replace("'", "&#39;") in text
    assert f"{100 * report.results.accuracy.final:.2f}" in text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_number_is_a_gap_and_spoils_no_chart(report: Report, number: float) -> None:
    rows = [{**row, "train_seen_loss": number} for row in report.rounds]
    before, after = (charts(page(grouped([each]))) for each in (report, replace(report, rounds=rows)))
    assert len(before) == len(after)
    assert [a == b for a, b in zip(before, after, strict=True)].count(False) == 1


def test_a_loaded_run_gets_the_same_page(report: Report, tmp_path: Path) -> None:
    assert page(grouped([Report.load(report.folder)])) == page(grouped([report]))


def test_every_run_leaves_its_page(report: Report, tmp_path: Path) -> None:
    """From Python, and each run of a sweep."""
    text = page(grouped([Report.load(report.folder)]))
    assert (report.folder / "report.html").read_text() == text
    (outcome,) = sweep([tiny(tmp_path, "rounds=1", "model.name=mlp")], run)
    assert outcome.report is not None
    assert (outcome.report.folder / "report.html").stat().st_size > 5e5
