"""A `Report` on a prompt is a line, in a notebook a table; a comparison leaves out runs that did not finish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from federation import run_tiny

from fl_sim import Report
from fl_sim.cli import main
from fl_sim.report import Unfinished
from fl_sim.report.sizes import size


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tiny(tmp_path_factory.mktemp("runs"), "model.name=mlp", "rounds=1")


def test_a_report_is_one_line_with_its_numbers(report: Report) -> None:
    line = repr(report)
    assert "\n" not in line
    assert len(line) < 150 + len(str(report.folder))
    for shown in (
        str(report.folder),
        f"accuracy {100 * report.summary['accuracy']['final']:.2f} %",
        f"{size(report.summary['uplink_bytes'], 3)} up",
        f"{size(report.summary['downlink_bytes'], 3)} down",
        f"saving {100 * report.summary['saving']:.2f} %",
    ):
        assert shown in line
    assert repr(replace(report, summary={})).endswith("summary.json: 'name': Field required)")


def test_a_notebook_shows_a_table_and_escapes_it(report: Report) -> None:
    hostile = replace(report, summary={**report.summary, "name": "<script>x</script>"})
    shown = hostile._repr_html_()
    assert f"<td>{100 * report.results.accuracy.final:.2f}</td>" in shown
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


def compared(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["fl-sim", "compare", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def test_unfinished_runs_are_left_out_with_a_note(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tmp_path / "tiny-0a1b2c3d"
    stopped.mkdir()
    (stopped / "lock").touch()
    with pytest.raises(Unfinished):
        Report.load(stopped)
    assert compared(monkeypatch, str(stopped), str(report.folder), "--format", "csv") == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert "left out" in said.err
    assert stopped.name in said.err.replace("\n", "")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("fault", ["none finished", "missing", "damaged"])
def test_what_is_no_unfinished_run_is_refused(
    fault: str, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typo or a damaged run must not silently be missing from a table."""
    folder = tmp_path / "run"
    if fault != "missing":
        folder.mkdir()
    if fault == "damaged":
        (folder / "summary.json").write_text("{")
    others = [] if fault == "none finished" else [str(report.folder)]
    assert compared(monkeypatch, str(folder), *others) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1


def test_an_unknown_baseline_is_refused_before_anything_is_written(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert compared(monkeypatch, str(report.folder), "--baseline", "nobody", "--html", str(page)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "allowed: tiny" in said.err
    assert not page.exists()
