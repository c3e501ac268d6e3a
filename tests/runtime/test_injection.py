"""More than two hundred seeded faults in small federations: each run ends as it must, and a table says what happened.

Every injection is a function of its seed. A run that was killed, starved of disk or damaged must, once resumed, equal the
run that nothing disturbed; a client that misbehaves must cost one update, and nothing else.
"""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import TINY, same
from interruption import KillAfter, Killed
from misbehaviour import FAULTS, KINDS

from fl_sim import Experiment, Report, load, local_sgd, run, snapshot
from fl_sim.config.experiment import run_folder
from fl_sim.core.types import Task, Update, UserError
from fl_sim.simulation import RunStopped, resume
from fl_sim.training.client import ClientContext

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
ROUNDS, COHORT, LIMIT_S = 4, 4, 60
METHODS: Mapping[str, dict[str, object]] = {
    "dense": {"evaluate": {"clients": 2}},
    "topk": {
        "client": {"target": "clients.presets:topk", "density": 0.1},
        "wire": {"error_feedback": True, "record_masks": True},
    },
    "pruned": {
        "strategy": {"target": "strategies.presets:gradual_magnitude", "density": 0.2, "end": 3},
        "cohort": {"size": 3},
    },
    "momentum": {
        "strategy": {"target": "strategies.presets:fedavg", "momentum": 0.9, "aggregate": "median"},
        "network": {"links": {"3G": 1}, "dropout": 0.2},
    },
}
SMALL = {**TINY, "rounds": ROUNDS, "model": {"name": "mlp", "width": 0.25}, "training": {"lr": 0.1, "batch_size": 64}}
happened: Counter[tuple[str, str, str]] = Counter()


def experiment(out: Path, method: str, **tree: object) -> Experiment:
    return Experiment.from_tree({**SMALL, "cohort": {"size": COHORT}, **METHODS[method], **tree, "out": str(out)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """A method's run that nothing disturbed."""
    return cache(lambda method: run(experiment(tmp_path_factory.mktemp(method), method)))


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print at the end what was injected and what happened."""
    yield
    rows = [(*key, str(count)) for key, count in sorted(happened.items())]
    rows = [("injected", "where", "what happened", "times"), *rows, ("all", "", "", str(happened.total()))]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *(f"{a:<28}{b:<24}{c:<44}{n:>6}" for a, b, c, n in rows), sep="\n")


def drawn(seed: int) -> tuple[np.random.Generator, str]:
    rng = np.random.default_rng(seed)
    return rng, list(METHODS)[int(rng.integers(len(METHODS)))]


# -- clients -----------------------------------------------------------------------------------------------------------


def faulty(task: Task, ctx: ClientContext) -> Update:
    """Trains, but where the config says so, misbehaves."""
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    update = Update(snapshot(model), ctx.num_examples)
    if task.round == task.config["at"] and ctx.num_examples == task.config["victim"]:
        if task.config["fault"] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return FAULTS[str(task.config["fault"])](update)  # type: ignore[return-value]
    return update


def misbehaving(tmp_path: Path, fault: str, at: int, victim: int, **tree: object) -> Report:
    client = {"target": f"{__name__}:faulty", "fault": fault, "victim": victim, "at": at}
    return run(Experiment.from_tree({**SMALL, "cohort": {"size": 6}, "client": client, "out": str(tmp_path), **tree}))


def check_one_loss(report: Report, at: int, kind: str) -> None:
    assert [row["clients"] for row in report.rounds] == [5 if n == at else 6 for n in range(1, ROUNDS + 1)]
    assert {k: v for k, v in report.summary["failures"].items() if v} == {kind: 1}
    ups = 6 * ROUNDS if kind == "rejected" else 6 * ROUNDS - 1
    assert report.ledger.messages(phase="train") == {"down": 6 * ROUNDS, "up": ups}
    assert all(bool(torch.isfinite(value).all()) for value in report.params.values())


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Numbers of examples that one client has alone."""
    from fl_sim.simulation.federation import Federation

    counts = Counter(
        len(part) for part in Federation.build(experiment(tmp_path_factory.mktemp("x"), "dense")).partitions
    )
    return sorted(size for size, clients in counts.items() if clients == 1)


@pytest.mark.parametrize("seed", range(75))
def test_a_client_misbehaves(tmp_path: Path, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    fault = list(FAULTS)[seed % len(FAULTS)]
    at, victim = int(rng.integers(1, ROUNDS + 1)), int(rng.choice(sizes))
    start = time.monotonic()
    limits = {"faults": {"timeout_s": 3.0}} if fault in ("hangs", "spins") else {}
    report = misbehaving(tmp_path, fault, at, victim, **limits)
    assert time.monotonic() - start < LIMIT_S
    kind = KINDS.get(fault, "raised")
    check_one_loss(report, at, kind)
    happened[f"client: {fault}", "inline", f"one update less, booked as {kind}"] += 1


@pytest.mark.parametrize("seed", range(8))
def test_a_worker_dies_or_hangs_on_ray(tmp_path: Path, sizes: list[int], ray_cluster: None, seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    fault, kind = (("dies", "lost"), ("hangs", "late"))[seed % 2]
    at, victim = int(rng.integers(1, ROUNDS + 1)), int(rng.choice(sizes))
    options = {"engine": "ray", "ray": {"workers": 2, "clients_per_task": int(rng.integers(1, 4))}}
    report = misbehaving(tmp_path, fault, at, victim, **options, faults={"timeout_s": 5.0})
    check_one_loss(report, at, kind)
    happened[f"worker: client {fault}", "Ray, 2 workers", f"one update less, booked as {kind}"] += 1


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


# -- the driver --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(45))
def test_stopped_between_two_replies(tmp_path: Path, whole: Callable[[str], Report], seed: int) -> None:
    rng, method = drawn(seed)
    asked = experiment(tmp_path, method, checkpoint={"every": int(rng.integers(1, 3))})
    with pytest.raises(Killed):
        run(asked, KillAfter(int(rng.integers(0, ROUNDS)), int(rng.integers(1, 4))))
    same(whole(method), resume(asked))
    happened["driver stopped", "between two replies", "resumed, equal bit for bit"] += 1


class Sabotage:
    """Fails the `at`-th call of a function of the operating system, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> None:
        self.real, self.left, self.error = getattr(os, name), at, error
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*args, **kwargs)


CALLS = ("replace", "fsync", "unlink", "open", "scandir")


@pytest.mark.parametrize("seed", range(45))
def test_stopped_inside_a_checkpoint(
    tmp_path: Path, whole: Callable[[str], Report], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """As a power failure would: between any two calls of the operating system."""
    rng, method = drawn(2000 + seed)
    undisturbed, asked = whole(method), experiment(tmp_path, method)
    call = CALLS[seed % len(CALLS)]
    with monkeypatch.context() as patch:
        Sabotage(patch, call, int(rng.integers(1, 25)), Killed())
        try:
            run(asked)
            outcome = "was over before"
        except Killed:
            outcome = "resumed, equal bit for bit"
    same(undisturbed, resume(asked))
    happened["driver stopped", f"in os.{call}", outcome] += 1


@pytest.mark.parametrize("seed", range(20))
def test_the_disk_is_full(
    tmp_path: Path,
    whole: Callable[[str], Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seed: int,
) -> None:
    """What the run needs stops it in one line; without what only `fl-sim watch` reads it goes on, and says so."""
    rng, method = drawn(3000 + seed)
    undisturbed, asked = whole(method), experiment(tmp_path, method)
    call, code = (("fsync", errno.ENOSPC), ("replace", errno.EACCES))[seed % 2]
    with monkeypatch.context() as patch:
        Sabotage(patch, call, int(rng.integers(1, 12)), OSError(code, os.strerror(code)))
        try:
            report, stopped = run(asked), ""
        except RunStopped as error:
            report, stopped = None, str(error)
    if report is None:
        assert os.strerror(code) in stopped
        assert "\n" not in stopped
        report, outcome = resume(asked), "stopped in one line, resumed, equal"
    else:
        assert f"live.json: {os.strerror(code)}; `fl-sim watch` sees nothing" in caplog.text
        outcome = "no live page, said, equal"
    same(undisturbed, report)
    happened[os.strerror(code), f"os.{call}", outcome] += 1


def _child(tree: dict[str, object]) -> None:
    torch.set_num_threads(1)
    run(Experiment.from_tree(tree))


def _has_begun(folder: Path, rounds: int) -> bool:
    """Whether a run has written its config and saved that many rounds."""
    return (folder / "config.toml").exists() and (rounds == 0 or _saved(folder) >= rounds)


def _saved(folder: Path) -> int:
    """The last round that has a manifest; 0 = none."""
    return max((int(p.stem.removeprefix("round-")) for p in (folder / "checkpoint").glob("round-*.json")), default=0)


def _killed(asked: Experiment, rng: np.random.Generator) -> Path:
    """Run in a process that is killed at some moment of some round; returns the run's folder."""
    child = mp.get_context("spawn").Process(target=_child, args=(asked.model_dump(mode="json", exclude_none=True),))
    child.start()
    folder, deadline = run_folder(asked), time.monotonic() + LIMIT_S
    wanted = int(rng.integers(0, ROUNDS))  # by rounds, not by seconds: a slow machine would die before its first one
    while not _has_begun(folder, wanted) and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(float(rng.uniform(0, 0.05)))
    child.kill()
    child.join()
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_kill_9_while_updates_are_under_way(tmp_path: Path, seed: int) -> None:
    """A federation without rounds: the checkpoint holds the updates that have not arrived, and what they started from."""
    rng = np.random.default_rng(6000 + seed)
    kind = ("fedbuff", "fedasync", "deadline")[seed % 3]
    tree: dict[str, object] = {
        "rounds": 8,
        "network": {"links": {"3G": 1, "4G": 1}, "speed_spread": 1.0, "dropout": 0.1},
        "schedule": {"kind": kind, "buffer": 3},
    }
    if kind == "deadline":
        tree["network"] = {"links": {"3G": 1}, "speed_spread": 3.0, "deadline_s": 0.5}
    undisturbed = run(experiment(tmp_path / "whole", "pruned", **tree))
    asked = experiment(tmp_path / "killed", "pruned", **tree)
    _killed(asked, rng)
    same(undisturbed, resume(asked))


@pytest.mark.parametrize("seed", range(20))
def test_kill_9_at_any_moment(tmp_path: Path, whole: Callable[[str], Report], seed: int) -> None:
    rng, method = drawn(4000 + seed)
    undisturbed, asked = whole(method), experiment(tmp_path, method)
    folder = _killed(asked, rng)
    reached = _saved(folder)
    over = (folder / "summary.json").exists()
    same(undisturbed, resume(asked))
    outcome = "was over before" if over else "resumed, equal bit for bit" if reached else "began again, equal"
    happened["kill -9 of the driver", "any moment", outcome] += 1


# -- the disk ----------------------------------------------------------------------------------------------------------


def spoil(path: Path, rng: np.random.Generator) -> str:
    data = bytearray(path.read_bytes())
    kind = ("a bit flipped", "cut short", "deleted", "zeroed")[int(rng.integers(4))]
    if kind == "deleted":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(data[: int(rng.integers(0, len(data)))])
    elif kind == "zeroed":
        path.write_bytes(bytes(len(data)))
    else:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    return kind


@pytest.mark.parametrize("seed", range(40))
def test_a_file_of_the_checkpoint_is_damaged(tmp_path: Path, whole: Callable[[str], Report], seed: int) -> None:
    """Either an older checkpoint is used or, where both need the damaged file, the run says so; it never goes on wrong."""
    rng, method = drawn(5000 + seed)
    asked = experiment(tmp_path, method)
    with pytest.raises(Killed):
        run(asked, KillAfter(int(rng.integers(2, ROUNDS))))
    files = sorted(p for p in (run_folder(asked) / "checkpoint").rglob("*") if p.is_file())
    kind = spoil(files[int(rng.integers(len(files)))], rng)
    refused = ""
    try:
        same(whole(method), resume(asked))
    except UserError as error:
        refused = str(error)
    outcome = "resumed, equal bit for bit"
    if refused:
        assert "--fresh (in Python: fresh=True) starts over" in refused
        same(whole(method), run(asked, fresh=True))
        outcome = "refused in one line; started over, equal"
    happened["checkpoint damaged", kind, outcome] += 1
