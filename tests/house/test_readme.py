"""The README is executed: its client runs as printed, its Python runs, its commands and files exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from federation import TINY

from fl_sim import Experiment, run

README = Path("README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
CONSOLE = [
    line[2:]
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the configs, as after cloning."""
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_client_runs_as_printed(tmp_path: Path) -> None:
    import tomllib

    (tmp_path / "my_clients.py").write_text(PYTHON[0])
    assert len(PYTHON[0].split("def ", 1)[1].strip().splitlines()) <= 20
    table = tomllib.loads(TOML[0])
    report = run(Experiment.from_tree({**TINY, **table}, ['out="out"']))
    fedavg = run(Experiment.from_tree({**TINY, **table}, ['out="out0"', "client.mu=0.0"]))
    assert report.summary["failures"]["raised"] == 0
    assert report.summary["params_sha256"] != fedavg.summary["params_sha256"]


def test_the_python_example_runs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PYTHON[1]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "('up', 'values')" in done.stdout


@pytest.mark.parametrize("command", [c for c in CONSOLE if "fl-sim" in c])
def test_the_commands_run(command: str) -> None:
    words = command.replace(".venv/bin/fl-sim", f"{sys.executable} -m fl_sim.cli").split()
    extra = ["rounds=1", "evaluate.every=1"] if {"run", "sweep"} & set(words) else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*words, *extra], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr


def test_make_targets_exist(request: pytest.FixtureRequest) -> None:
    makefile = (request.config.rootpath / "Makefile").read_text()
    named = set(re.findall(r"`?(?:\$ )?make ([a-z-]+)", README))
    assert named >= {"demo", "test", "test-all", "lint", "bench"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_dependency_has_its_reason(request: pytest.FixtureRequest) -> None:
    import tomllib

    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())["project"]
    section = README.split("## Dependencies")[1]
    for requirement in project["dependencies"]:
        assert re.match(r"[\w-]+", requirement)[0] in section, textwrap.shorten(requirement, 40)
