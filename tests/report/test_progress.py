"""The live display: whole numbers in 80 columns on a terminal, one line a round on a pipe, nothing when quiet."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from federation import tiny
from rich.console import Console

from fl_sim import Experiment, run
from fl_sim.core.observer import Silent
from fl_sim.report import progress
from fl_sim.report.progress import display

ROW = {
    "round": 2.0,
    "accuracy": 0.5,
    "uplink_bytes": 1.5e6,
    "downlink_bytes": 2e6,
    "saved_bytes": 3.25e6,
    "density": 1.0,
}


def shown(*, terminal: bool, quiet: bool = False, width: int = 80, title: str = "") -> str:
    """What a run of two rounds writes."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width)
    experiment = Experiment(name="a-run-with-a-name-of-some-length", rounds=2)
    with display(experiment, console, quiet=quiet, title=title) as observer:
        observer.reply(10, 10)
        observer.round({name: value for name, value in ROW.items() if name not in ("accuracy", "saved_bytes")})
        observer.reply(10, 10)
        observer.round(ROW)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())


def test_a_terminal_of_80_columns_shows_everything() -> None:
    text = shown(terminal=True)
    last = text.splitlines()[-2:]
    assert "2/2" in last[0]
    assert "left" in last[0]
    assert last[1].strip() == "accuracy  50.00 %  up 1.50 MB  down 2.00 MB  saved 3.25 MB  alive 100 %"
    assert "…" not in text
    assert "0/10" in text  # while it ran; of a run that is over, no client is waited for
    assert "0/10" not in "".join(last)


def test_a_narrow_terminal_shows_every_number_on_two_lines() -> None:
    text = shown(terminal=True, width=40)
    words = " ".join(text.split())
    assert "accuracy 50.00 % up 1.50 MB down 2.00 MB saved 3.25 MB alive 100 %" in words
    assert re.search(r"a-run…\S* +\S+ 2/2 0:00:00 left \S+$", text.replace("a-run-…", "a-run…"), re.MULTILINE)


def test_a_run_of_a_sweep_names_itself_and_leaves_the_screen() -> None:
    for line in shown(terminal=False, title="3/6  runs/x  seed 2  a=[1]").splitlines():
        assert line.startswith("3/6  runs/x  seed 2  a=[1]  round 2/2  accuracy  50.00 %")
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80)
    with display(Experiment(rounds=2), console, quiet=False, title="3/6  seed 2  a=[1]") as observer:
        observer.round(ROW)
    assert "3/6  seed 2  a=[1]" in text.getvalue()
    assert text.getvalue().endswith("\x1b[1A\x1b[2K" * 3)


def test_a_pipe_gets_a_line_an_evaluated_round() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines == ["round 2/2  accuracy  50.00 %  up 1.50 MB  down 2.00 MB  saved 3.25 MB  alive 100 %"]


def test_quiet_shows_nothing() -> None:
    assert shown(terminal=True, quiet=True) == ""


def test_the_accuracy_stays_between_evaluations_and_names_its_round() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with display(Experiment(rounds=4), console, quiet=False) as observer:
        observer.round(ROW)
        observer.round({"round": 3.0, "uplink_bytes": 2.5e6, "downlink_bytes": 3e6, "density": 1.0})
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).splitlines()[-1]
    assert last.strip() == "accuracy  50.00 %  (round 2)  up 2.50 MB  down 3.00 MB  saved 3.25 MB  alive 100 %"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_notebook_shows_bars_time_left_and_numbers_in_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython stands for the notebook: it is told what to show once, and then shows that anew."""
    outputs: list[list[str]] = []

    def display(shown: Any, *, display_id: bool) -> Any:
        def update(again: Any) -> None:
            outputs[0].append(again._repr_mimebundle_([], [])["text/plain"])

        outputs.append([])
        assert display_id
        update(shown)
        return SimpleNamespace(update=update)

    for name in ("IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["IPython.display"], "display", display, raising=False)
    monkeypatch.setattr(progress, "CELL_S", 0.0)
    with progress.display(Experiment(rounds=4), Console(force_jupyter=True), quiet=False) as observer:
        observer.reply(3, 10)
        observer.round(ROW)
    (texts,) = outputs
    first, answered, over, last = (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text) for text in texts)
    assert "0/4" in first
    assert "left" in first
    assert "3/10" in answered
    assert "2/4" in over
    assert "accuracy  50.00 %" in over
    assert "clients" not in last


@pytest.mark.parametrize(
    ("terminal", "quiet", "seen"),
    [(False, None, False), (True, None, True), (True, True, False), (False, False, True)],
)
def test_a_run_from_python_shows_its_progress_on_a_terminal_or_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, quiet: bool | None, seen: bool
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stream)
    run(tiny(tmp_path, "rounds=1", "data.clients=2", "cohort.size=1"), quiet=quiet)
    assert ("accuracy" in stream.getvalue()) is seen


def test_a_given_observer_takes_the_place_of_the_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    run(tiny(tmp_path, "rounds=1", "data.clients=2", "cohort.size=1"), Silent())
    assert stream.getvalue() == ""
