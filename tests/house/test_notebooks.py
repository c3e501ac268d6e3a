"""The notebooks in examples/ run from top to bottom in an empty folder."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from command import cli_here

NOTEBOOKS = sorted(Path("examples").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"launch_and_read", "own_client"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    program = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")

    def here(command: Sequence[str], **options: bool) -> subprocess.CompletedProcess[str]:
        """A command of fl-sim, which a notebook gives a process of its own, in this one: a start takes seconds."""
        assert list(command[:3]) == [sys.executable, "-m", "fl_sim.cli"]
        assert options == {"capture_output": True, "text": True}
        with redirect_stdout(printed := io.StringIO()):
            status = cli_here(monkeypatch, *command[3:])
        return subprocess.CompletedProcess(command, status, printed.getvalue(), "")

    monkeypatch.setattr("subprocess.run", here)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(path), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "✗" not in printed, printed
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_stored_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
