"""The live display: whole numbers in 80 columns on a terminal, one line a round on a pipe, nothing when quiet."""

from __future__ import annotations

import io
import re

from rich.console import Console

from fl_sim import Experiment
from fl_sim.report.progress import display

ROW = {
    "round": 2.0,
    "accuracy": 0.5,
    "uplink_bytes": 1.5e6,
    "downlink_bytes": 2e6,
    "saved_bytes": 3.25e6,
    "density": 1.0,
}


def shown(*, terminal: bool, quiet: bool = False) -> str:
    """What a run of two rounds writes."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80)
    with display(Experiment(name="a-run-with-a-name-of-some-length", rounds=2), console, quiet=quiet) as observer:
        observer.reply(10, 10)
        observer.round({name: value for name, value in ROW.items() if name not in ("accuracy", "saved_bytes")})
        observer.round(ROW)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())


def test_a_terminal_of_80_columns_shows_everything() -> None:
    last = shown(terminal=True).splitlines()[-3:]
    assert "2/2" in last[0]
    assert "10/10" in last[1]
    assert last[2].strip() == "accuracy  50.00 %  up 1.50 MB  down 2.00 MB  saved 3.25 MB  alive 100 %"
    assert "…" not in "".join(last)


def test_a_pipe_gets_a_line_an_evaluated_round() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines == ["round 2/2  accuracy  50.00 %  up 1.50 MB  down 2.00 MB  saved 3.25 MB  alive 100 %"]


def test_quiet_shows_nothing() -> None:
    assert shown(terminal=True, quiet=True) == ""
