"""docs/tutorial.md as a newcomer follows it: its files are saved, its commands run, in the order of the page.

Only the configs differ: their clients train one step where they train two epochs.
"""

from __future__ import annotations

import glob
import re
import shlex
import sys
from pathlib import Path

import pytest
from command import cli_here

from fl_sim import Report

PAGE = Path("docs/tutorial.md").read_text(encoding="utf-8")
FILES = re.findall(r"Save this as `(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
ADVISE = "advise configs/quickstart.toml rounds=3 --budget 4MB"
COMMANDS = re.findall(r"^\$ fl-sim (.*)$", PAGE, re.MULTILINE)


def test_the_tasks_work_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").mkdir()
    for config in Path("configs").glob("*.toml"):
        short = re.sub(r"^epochs = \d+$", "steps = 1", config.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (tmp_path / "configs" / config.name).write_text(short)
    monkeypatch.chdir(tmp_path)
    for name, text in FILES:
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    assert len(re.findall(r"^## \d", PAGE, re.MULTILINE)) == 7
    assert len(COMMANDS) >= 11
    said = {}
    for command in COMMANDS:
        words = [found for word in shlex.split(command) for found in (sorted(glob.glob(word)) or [word])]
        assert cli_here(monkeypatch, *words) == 0, (command, capsys.readouterr().err)
        said[command] = capsys.readouterr().out
    assert len(said[COMMANDS[1]].splitlines()) == 10
    sweep = next(text for command, text in said.items() if command.startswith("sweep"))
    assert sweep.count("already there") == 1
    runs = [Report.load(folder) for folder in sorted((tmp_path / "runs").iterdir())]
    names = ["mine", *["quickstart"] * 3, "quickstart-rounded", "stripes", *["topk"] * 4]
    assert sorted(run.results.name for run in runs) == names
    (advised,) = (run.results for run in runs if run.results.name == "quickstart-rounded")
    predicted = re.search(r"^ *1 +rounded +3 .* (\d+\.\d+) +\d+\.\d +\d+\.\d+ *$", said[ADVISE], re.MULTILINE)
    assert predicted is not None
    assert float(predicted[1]) == pytest.approx(advised.total_bytes / 1e6, rel=0.03)
    assert max(run.results.rounds for run in runs) == 5
    assert all((run.folder / "report.html").stat().st_size < 1_000_000 for run in runs)
    for page in ("comparison.html", "to-share.html"):
        assert (tmp_path / page).read_text().startswith("<!doctype html>")
