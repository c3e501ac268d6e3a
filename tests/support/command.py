"""The command line, in a process of its own or in this one, where a start takes no seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fl_sim.cli import main


def cli(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "fl_sim.cli", *words], capture_output=True, text=True, check=False, cwd=cwd, env=env
    )


def cli_here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run a command in this process; its exit status."""
    monkeypatch.setattr("sys.argv", ["fl-sim", *words])
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)
