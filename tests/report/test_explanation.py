"""`fl-sim explain` and the rich form of a report: ten lines whose numbers are those of the summary."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from federation import run_tiny
from rich.console import Console

from fl_sim import Report
from fl_sim.cli import main
from fl_sim.report import explanation
from fl_sim.report.sizes import size


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("runs")
    return run_tiny(out, "model.name=mlp", "client=clients.presets:topk", "client.density=0.1", "evaluate.clients=2")


def test_ten_lines_have_the_numbers_of_the_summary(report: Report) -> None:
    lines, r = explanation(report), report.results
    assert len(lines) == 10
    assert all(len(line) > 11 and line[10] == " " for line in lines)
    assert lines[6].startswith(f"encoded    {size(r.total_bytes, 3)}: {size(r.uplink_bytes, 3)} up, ")
    assert f"{size(r.mask_bytes, 3)} of masks" in lines[6]
    assert f"{100 * r.saving:.2f} % ({size(r.saving * r.dense_total_bytes, 3)})" in lines[7]
    assert size(r.dense_total_bytes, 3) in lines[8]
    evaluation = report.ledger.total(where={"phase": "evaluate"})[()]
    assert f"of the saving: {size(evaluation, 3)} of evaluation" in lines[9]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (57, "57 B"), (1234, "1.23 kB"), (99_999, "100.00 kB"), (390_000, "0.39 MB"), (-2e9, "-2000.00 MB")],
)
def test_a_size_has_digits_in_its_unit(count: float, text: str) -> None:
    assert size(count) == text


def test_what_a_builder_froze_is_said_not_to_be_in_the_dense_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, report: Report
) -> None:
    frozen = run_tiny(tmp_path / "builder", "model.name=special:build_frozen_backbone")
    assert "its builder froze 4 entries" in caplog.text
    assert "model (without the parameters that its builder froze): " in explanation(frozen)[8]
    chosen = run_tiny(tmp_path / "trainable", "model.name=cnn", "model.trainable=head")
    assert "froze" not in explanation(chosen)[8] + explanation(report)[8]


def test_a_run_that_saved_nothing_says_so(report: Report) -> None:
    worse = replace(report, summary={**report.summary, "saving": -0.25})
    assert explanation(worse)[7].startswith("saved      nothing: 25.00 % (")


def test_the_command_and_rich_show_the_same(
    report: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fl-sim", "explain", str(report.folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines() == explanation(report)
    text = io.StringIO()
    Console(file=text, width=1000).print(report)
    assert [line.rstrip() for line in text.getvalue().splitlines()] == explanation(report)


def test_a_narrow_terminal_keeps_every_word_below_its_entry(report: Report) -> None:
    text = io.StringIO()
    Console(file=text, width=60).print(report)
    lines = text.getvalue().splitlines()
    assert sum(line[0] != " " for line in lines) == 10
    assert max(map(len, lines)) <= 60
    assert all(line[10] == " " for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(explanation(report)).split())


def test_markup_of_a_name_is_shown_as_it_is(report: Report) -> None:
    hostile = replace(report, summary={**report.summary, "name": "[red]x[/red]"})
    text = io.StringIO()
    Console(file=text, width=1000).print(hostile)
    assert "[red]x[/red]" in text.getvalue()


def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fl-sim", "explain", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
