"""The process and the folder that fl-sim shares with a user's code: names, exits, folders, child processes, leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from command import cli_here

CLIENT = """
import os
from pathlib import Path
from fl_sim import Update, load, local_sgd, snapshot

def trains(task, ctx):
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples, task.mask)

def moves(task, ctx):
    update = trains(task, ctx)
    os.makedirs("elsewhere", exist_ok=True)
    os.chdir("elsewhere")
    return update

def loads(task, ctx):
    import torch
    from torch.utils.data import DataLoader
    assert sum(len(x) for x in DataLoader(torch.arange(10), num_workers=1)) == 10
    return trains(task, ctx)

def registers(task, ctx):
    Path(task.config["folder"], str(os.getpid())).touch()
    return trains(task, ctx)
"""
CONFIG = """
name = "t"
rounds = 2
[data]
clients = 4
[cohort]
size = 2
[workers]
count = 2
"""
EXITS = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--epochs')\np.parse_args()\ndef f(task, ctx): ...\n"
RUN = [sys.executable, "-c", "from fl_sim.cli import main; main()", "run", "t.toml"]


MOVES = [
    ["run", "t.toml", "client=mine:moves", "--engine", "inline", "--out", "inline"],
    ["run", "t.toml", "client=mine:moves", "--engine", "workers", "--out", "workers"],
    ["sweep", "t.toml", "client=mine:moves", "rounds=1", "--seeds", "0,1", "--quiet", "--out", "sweep"],
    ["run", "t.toml", "client=mine:loads", "rounds=1", "--engine", "workers", "--out", "loads"],
]
"""Clients that change the folder, on each engine and in a sweep of one process, and one that starts processes."""


def prepared(folder: Path) -> Path:
    (folder / "t.toml").write_text(CONFIG)
    (folder / "mine.py").write_text(CLIENT)
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return prepared(tmp_path)


def in_turn(folder: Path, *runs: list[str]) -> subprocess.CompletedProcess[str]:
    """Several commands of `fl-sim` in one process, which a start takes seconds of; prints each one's exit status."""
    code = (
        "import sys\nfrom fl_sim.cli import main\n"
        f"for words in {runs!r}:\n"
        "    sys.argv = ['fl-sim', *words]\n"
        "    try:\n        main()\n"
        "    except SystemExit as ended:\n        print(f'\\nstatus {ended.code or 0}', flush=True)\n"
    )
    (temporary := folder / ("t" * 100)).mkdir()  # the path of a socket there would be too long
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "COLUMNS": "200", "TMPDIR": str(temporary)}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def statuses(done: subprocess.CompletedProcess[str]) -> list[int]:
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status ")]


def run_beside_packages_of_ours(here: Path, init: str | None) -> subprocess.CompletedProcess[str]:
    """All commands of this file that can share a start, beside a `clients` and a `strategies` of the user's."""
    (here / "clients").mkdir()
    (here / "clients" / "mine.py").write_text(CLIENT)
    if init is not None:
        (here / "clients" / "__init__.py").write_text(init)
    (here / "strategies.py").write_text("def fedavg(): ...\n")
    return in_turn(
        here,
        ["run", "t.toml", "client=clients.mine:trains", "--engine", "workers"],
        ["run", "t.toml", "client=clients.presets:fedprox", "rounds=1"],
        ["run", "t.toml", "strategy=strategies:fedavg"],
        *MOVES,
    )


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder where the user's `clients` has an `__init__.py`, and what its commands said."""
    folder = prepared(tmp_path_factory.mktemp("beside"))
    return folder, run_beside_packages_of_ours(folder, "from_init = 1\n")


def require_found(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert statuses(done)[:3] == [0, 0, 2], done.stderr
    assert f"fl-sim has a module 'strategies' of its own, so {folder / 'strategies.py'} is not seen" in done.stderr


def test_a_users_own_clients_and_strategies_are_found_beside_ours(
    beside: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    require_found(*beside)


@pytest.mark.slow
def test_a_users_own_clients_without_an_init_are_found_too(here: Path) -> None:
    require_found(here, run_beside_packages_of_ours(here, None))


def test_a_script_may_import_its_own_strategies_before_fl_sim_and_imports_no_compiler(here: Path) -> None:
    """PyTorch's compiler takes a second of every process's start, and Ray, scikit-learn and Plotly others."""
    (here / "strategies.py").write_text("mine = 3\n")
    code = (
        "import sys\nimport strategies, fl_sim\nfrom strategies.presets import fedavg\n"
        "print(strategies.mine, fedavg().config)\n"
        "fl_sim.run(fl_sim.Experiment.load('t.toml', ['engine=inline', 'rounds=1']))\n"
        "print([name for name in ('torch._dynamo', 'triton', 'sklearn', 'ray', 'plotly') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{os.getcwd()}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert (said[0], said[-1]) == ("3 {}", "[]"), done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (EXITS, "importing leaves called sys.exit(2) after it said"),
        ("import sys\nsys.exit()\n", "importing leaves called sys.exit(None); what only a script does"),
        ("raise SystemExit('no data')\n", "importing leaves called sys.exit('no data')"),
    ],
)
def test_a_module_that_exits_when_imported_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (here / "leaves.py").write_text(text)
    monkeypatch.chdir(here)
    status, lines = cli_here(monkeypatch, "run", "t.toml", "client=leaves:f"), capfd.readouterr().err
    assert status == 2
    assert said in lines
    assert len(lines.strip().splitlines()) == 1


def test_clients_that_change_the_folder_or_start_processes_change_nothing(
    beside: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """On each engine, in a sweep of one process, and where the client itself may start processes; the TMPDIR is long."""
    here, done = beside
    assert statuses(done)[3:] == [0] * len(MOVES), done.stderr
    for name in ("inline", "workers"):
        (folder,) = (here / name).iterdir()
        assert {"summary.json", "rounds.jsonl", "ledger.parquet", "report.html"} <= set(os.listdir(folder))
    assert len(list((here / "sweep").glob("*/summary.json"))) == 2
    assert not list(here.glob("**/elsewhere/**/summary.json"))
    assert "daemonic" not in done.stderr


def _until(holds: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder of temporary files that is short enough for the path of a socket; `tmp_path` may not be."""
    with TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's list of processes")
@pytest.mark.parametrize("stopped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_killed_program_leaves_no_worker_and_no_folder(here: Path, temporary: Path, stopped: bool) -> None:
    pids = here / "pids"
    pids.mkdir()
    words = ["client.target=mine:registers", f'client.folder="{pids}"', "rounds=100000", "--engine", "workers"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TMPDIR": str(temporary)}
    program = subprocess.Popen([*RUN, *words, "--quiet"], cwd=here, env=environment, stderr=subprocess.DEVNULL)
    try:
        assert _until(lambda: len(list(pids.iterdir())) == 2, 120)
        assert [path.name.startswith("pymp-") for path in temporary.iterdir()] == [True]
        workers = [int(path.name) for path in pids.iterdir()]
        if stopped:
            for worker in workers:
                os.kill(worker, signal.SIGSTOP)
    finally:
        program.kill()
        program.wait()
    assert _until(lambda: all(map(_gone, workers)))
    assert _until(lambda: not list(temporary.iterdir()))
