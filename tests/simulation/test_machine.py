"""The machine fails: a disk that is full or read-only, no memory left, a GPU that is gone, a program that is killed.

Nothing is stood in for where a test can have the real thing: a small disk is mounted and filled (root only), memory is
limited by the system. What no test machine loses is a GPU; for that, PyTorch's answers are those of a lost one.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest
import torch
from federation import TINY, same, tiny
from interruption import KillAfter, Killed

from fl_sim import Experiment, Report, load, local_sgd, run, snapshot
from fl_sim.config.experiment import run_folder
from fl_sim.core.observer import Silent
from fl_sim.core.types import Task, Update, UserError
from fl_sim.simulation import RunStopped, resume
from fl_sim.training.client import ClientContext

SMALL = ("rounds=4", "model.name=mlp", "model.width=0.25", "client.target=clients.presets:topk", "client.density=0.1")
KEPT = (*SMALL, "wire.error_feedback=true")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Report]:
    """The run that nothing disturbed."""
    return cache(lambda: run(tiny(tmp_path_factory.mktemp("whole"), *KEPT)))


@dataclass
class At(Silent):
    """Does something once a round is done."""

    number: int
    action: Callable[[], object]

    def round(self, row: Mapping[str, float]) -> None:
        if row["round"] == self.number:
            self.action()


def stopped(experiment: Experiment, observer: Silent, words: str) -> None:
    """The run must end in one line that says what is wrong and that its rounds are safe."""
    with pytest.raises(RunStopped, match=words) as caught:
        run(experiment, observer)
    assert re.search(r"[23] finished rounds are kept, --resume goes on from there", str(caught.value))
    assert "\n" not in str(caught.value)


# -- the disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, *, left: int) -> None:
    """Use up a disk but for some bytes."""
    status = os.statvfs(place)
    (place / "ballast").write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - left)))


@pytest.mark.parametrize("left", [0, 8_000])
def test_a_full_disk_stops_the_run_which_goes_on_once_there_is_room(
    disk: Path, whole: Callable[[], Report], left: int
) -> None:
    experiment = tiny(disk, *KEPT)
    stopped(experiment, At(2, lambda: fill(disk, left=left)), "No space left on device")
    with pytest.raises((RunStopped, OSError), match="No space left"):
        resume(experiment)
    (disk / "ballast").unlink()
    same(whole(), resume(experiment))


def test_a_disk_that_fills_up_at_the_very_end_loses_nothing(disk: Path, whole: Callable[[], Report]) -> None:
    """When the results are written, which need more room than the rounds did."""
    experiment = tiny(disk, *KEPT)
    with pytest.raises(RunStopped, match=r"No space left on device; 4 finished rounds are kept"):
        run(experiment, At(4, lambda: fill(disk, left=0)))
    assert not (run_folder(experiment) / "summary.json").exists()
    (disk / "ballast").unlink()
    same(whole(), resume(experiment))


def test_a_folder_that_becomes_read_only(disk: Path, whole: Callable[[], Report]) -> None:
    experiment = tiny(disk, *KEPT)

    def forbid() -> None:
        # Over itself: a mount through which a file is open for writing cannot become read-only.
        subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)

    try:
        stopped(experiment, At(2, forbid), "Read-only file system")
        with pytest.raises(UserError, match="Read-only file system"):
            resume(experiment)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    same(whole(), resume(experiment))


def test_files_may_not_grow_any_more(tmp_path: Path, whole: Callable[[], Report]) -> None:
    """A quota, as far as every system has one."""
    experiment, before = tiny(tmp_path, *KEPT), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        stopped(experiment, At(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))), "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    same(whole(), resume(experiment))


@pytest.mark.parametrize(
    "name", ["config.toml", "partition.json", "rounds.jsonl", "ledger.parquet", "model.safetensors", "summary.json"]
)
def test_no_file_of_a_run_is_written_through_a_link(tmp_path: Path, whole: Callable[[], Report], name: str) -> None:
    """An imported run folder could lead anywhere."""
    experiment, victim = tiny(tmp_path, *KEPT), tmp_path / "victim"
    victim.write_text("mine")
    with pytest.raises(Killed):
        run(experiment, KillAfter(2))
    # A summary that can be read means that the run is over, so there it is the file beside alone.
    for hostile in (name, f"{name}.tmp")[name == "summary.json" :]:
        (run_folder(experiment) / hostile).unlink(missing_ok=True)
        (run_folder(experiment) / hostile).symlink_to(victim)
    same(whole(), resume(experiment))
    assert victim.read_text() == "mine"
    assert not (run_folder(experiment) / name).is_symlink()


# -- memory ------------------------------------------------------------------------------------------------------------


def hungry(task: Task, ctx: ClientContext) -> Update:
    """In round 2, one partition wants more memory than its process may have: a tensor, or `threads` with their stacks."""
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    update = Update(snapshot(model), ctx.num_examples)
    if task.round == 2 and ctx.num_examples == task.config["victim"]:
        before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 20_000_000, before[1]))
        try:
            if task.config["threads"]:
                torch.set_num_threads(64)
                torch.ones(4_000_000).exp()  # OpenMP ends a process whose threads cannot be made
            torch.ones(1_000_000_000)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return update


@pytest.mark.parametrize(
    ("engine", "threads", "kind"),
    [
        ("inline", False, "raised"),
        ("workers", False, "raised"),
        ("workers", True, "lost"),
        pytest.param("ray", False, "raised", marks=pytest.mark.slow),
        pytest.param("ray", True, "lost", marks=pytest.mark.slow),
    ],
)
def test_a_client_that_wants_too_much_memory_costs_one_update(
    tmp_path: Path, engine: str, threads: bool, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = {"target": f"{__name__}:hungry", "victim": 118, "threads": threads}
    tree = {**TINY, "client": client, "cohort": {"size": 6}, "rounds": 3, "engine": engine}
    report = run(Experiment.from_tree(tree, [f'out="{tmp_path}"', "workers.count=2", "ray.workers=2"]))
    assert [row["clients"] for row in report.rounds] == [6, 5, 6]
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0, kind: 1}
    assert ("process died" if threads else "can't allocate memory") in caplog.text


# -- the GPU -----------------------------------------------------------------------------------------------------------

LOST = """CUDA error: unspecified launch failure
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""


def lose_the_gpu(*args: object) -> None:
    raise torch.AcceleratorError(LOST)


def on_a_gpu(task: Task, ctx: ClientContext) -> Update:
    """Trains, unless the GPU that `gone` stands for is; then every call of CUDA fails, as it does on a lost device."""
    if task.round == 3 and Path(str(task.config["gone"])).exists():
        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = lose_the_gpu
        lose_the_gpu()
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples)


def test_a_lost_gpu_stops_the_run_at_once_and_spoils_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many failures are allowed: no client of this process could succeed, and none is to blame."""
    gone = tmp_path / "gone"
    client = {"target": f"{__name__}:on_a_gpu", "gone": str(gone)}
    tree = {**TINY, "client": client, "rounds": 4, "faults": {"max_share": 1.0}}
    undisturbed = run(Experiment.from_tree(tree, [f'out="{tmp_path / "whole"}"']))
    experiment = Experiment.from_tree(tree, [f'out="{tmp_path}"'])
    gone.touch()
    with monkeypatch.context() as patch:
        for name in ("is_initialized", "synchronize"):  # for this process to get them back
            patch.setattr(torch.cuda, name, getattr(torch.cuda, name))
        stopped(experiment, Silent(), r"the GPU answers no more; client \d: AcceleratorError: CUDA error: unspecified")
    gone.unlink()
    same(undisturbed, resume(experiment))


def test_a_worker_that_lost_its_gpu_is_replaced(tmp_path: Path) -> None:
    """A fresh process may have the GPU again; one that finds none stops the run (`cannot_start` in test_workers.py)."""
    client = {"target": f"{__name__}:loses_it_once", "mark": str(tmp_path / "mark")}
    tree = {**TINY, "client": client, "rounds": 3, "engine": "workers", "workers": {"count": 2}}
    report = run(Experiment.from_tree(tree, [f'out="{tmp_path}"']))
    assert (tmp_path / "mark").exists()
    assert sum(report.summary["failures"].values()) == 0


def loses_it_once(task: Task, ctx: ClientContext) -> Update:
    """The first client of round 2 loses the GPU."""
    if task.round == 2:
        try:
            Path(str(task.config["mark"])).touch(exist_ok=False)
        except FileExistsError:
            return Update(dict(task.params), ctx.num_examples)
        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = lose_the_gpu
        lose_the_gpu()
    return Update(dict(task.params), ctx.num_examples)


# -- the program -------------------------------------------------------------------------------------------------------


def for_ever(task: Task, ctx: ClientContext) -> Update:
    """Says which process it is in, and hangs."""
    Path(str(task.config["folder"]), str(os.getpid())).touch()
    time.sleep(3600)
    return Update(dict(task.params), ctx.num_examples)


def _hanging(tree: dict[str, object]) -> None:
    run(Experiment.from_tree(tree))


@pytest.mark.parametrize("engine", ["workers", pytest.param("ray", marks=pytest.mark.slow)])
def test_workers_end_with_a_program_that_is_killed_whatever_they_are_at(tmp_path: Path, engine: str) -> None:
    (tmp_path / "pids").mkdir()
    client = {"target": f"{__name__}:for_ever", "folder": str(tmp_path / "pids")}
    tree = {**TINY, "client": client, "engine": engine, "workers": {"count": 2}, "ray": {"workers": 2}}
    shared = Path(get_temp_dir())
    program = mp.get_context("spawn").Process(target=_hanging, args=({**tree, "out": str(tmp_path)},))
    program.start()
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert len(pids) == 2
    program.kill()
    program.join()
    while any(map(_lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, pids))
    time.sleep(0.5)
    assert shared.exists(), "the folder of this program's own workers"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def leaves(task: Task, ctx: ClientContext) -> Update:
    """Ends the program, as it believes."""
    if ctx.num_examples == task.config["victim"]:
        raise SystemExit(0)
    return Update(dict(task.params), ctx.num_examples)


@pytest.mark.parametrize("engine", ["inline", "workers"])
def test_a_client_cannot_end_the_program(tmp_path: Path, engine: str) -> None:
    client = {"target": f"{__name__}:leaves", "victim": 118}
    tree = {**TINY, "client": client, "cohort": {"size": 6}, "engine": engine, "workers": {"count": 2}}
    report = run(Experiment.from_tree(tree, [f'out="{tmp_path}"']))
    assert report.summary["failures"] == {"raised": 2, "rejected": 0, "late": 0, "lost": 0}
