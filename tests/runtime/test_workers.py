"""The workers engine, real: bit-identical to inline for any number of processes, and it recovers from killed ones."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from federation import FOUR, TINY, run_tiny, same, tiny

from fl_sim import Experiment, load, local_sgd, run, snapshot
from fl_sim.core.observer import Silent
from fl_sim.core.types import Task, Update
from fl_sim.simulation import RunStopped, resume
from fl_sim.simulation.engines import settled
from fl_sim.training.client import ClientContext

METHODS = {
    "dense": [],
    "topk": [
        "client.target=clients.presets:topk",
        "client.density=0.1",
        "wire.error_feedback=true",
        "wire.uplink.values=int8",
        "rounds=3",
    ],
    "local_statistics": ["model.trainable=batchnorm", "model.statistics=local", "evaluate.clients=2"],
}


@pytest.mark.parametrize(("method", "counts"), [("dense", (1, 2)), ("topk", (2,)), ("local_statistics", (2,))])
def test_same_as_inline_for_any_number_of_processes(tmp_path: Path, method: str, counts: tuple[int, ...]) -> None:
    inline = run_tiny(tmp_path / "inline", *METHODS[method])
    for count in counts:
        options = [*METHODS[method], "engine=workers", f"workers.count={count}"]
        same(inline, run_tiny(tmp_path / str(count), *options))


def suicidal(task: Task, ctx: ClientContext) -> Update:
    """One partition kills its process in round 2, as an out-of-memory killer would."""
    if task.round == 2 and ctx.num_examples == task.config["victim"]:
        os.kill(os.getpid(), signal.SIGKILL)
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples)


def sleepy(task: Task, ctx: ClientContext) -> Update:
    """One partition never answers in round 2."""
    if task.round == 2 and ctx.num_examples == task.config["victim"]:
        time.sleep(3600)
    return Update(dict(task.params), ctx.num_examples)


@pytest.mark.parametrize(
    ("client", "kind", "options"), [("suicidal", "lost", []), ("sleepy", "late", ["faults.timeout_s=1"])]
)
def test_a_killed_or_hanging_client_costs_one_update_and_its_process_comes_back(
    tmp_path: Path, client: str, kind: str, options: list[str]
) -> None:
    tree = {**TINY, "client": {"target": f"{__name__}:{client}", "victim": 118}, "cohort": {"size": 6}, "rounds": 3}
    report = run(Experiment.from_tree(tree, [f'out="{tmp_path}"', "engine=workers", "workers.count=2", *options]))
    assert [row["clients"] for row in report.rounds] == [6, 5, 6]
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0} | {kind: 1}
    assert report.ledger.messages(phase="train") == {"down": 18, "up": 17}


def registering(task: Task, ctx: ClientContext) -> Update:
    """Leaves its process id in a folder."""
    Path(str(task.config["folder"]), str(os.getpid())).touch()
    return Update(dict(task.params), ctx.num_examples)


def test_no_process_and_no_shared_memory_is_left(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    before = os.listdir("/dev/shm")
    client = {"target": f"{__name__}:registering", "folder": str(tmp_path / "pids")}
    run(Experiment.from_tree({**TINY, "client": client}, [f'out="{tmp_path}"', "engine=workers", "workers.count=2"]))
    pids = {int(path.name) for path in (tmp_path / "pids").iterdir()}
    assert pids
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert os.listdir("/dev/shm") == before


def cannot_start(*, training: object) -> object:
    """A preset that works in the program and in no worker."""
    if multiprocessing.parent_process() is not None:
        raise OSError("no licence")
    return registering


def test_a_process_that_cannot_start_stops_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="could not start: OSError: no licence"):
        run(tiny(tmp_path, f"client={__name__}:cannot_start", "engine=workers", "workers.count=1"))


def test_resumed_on_workers_as_if_never_stopped_inline(tmp_path: Path) -> None:
    """What clients keep comes back to processes that never saw it."""
    options = METHODS["topk"]

    class Stop(Silent):
        def round(self, row: Mapping[str, float]) -> None:
            if row["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path / "workers", *options, "engine=workers", "workers.count=2"), Stop())
    same(
        run_tiny(tmp_path / "whole", *options),
        resume(tiny(tmp_path / "workers", *options, "engine=workers", "workers.count=1")),
    )


@pytest.mark.parametrize(
    ("options", "engine", "why"),
    [
        (['ray.address="1.2.3.4:6379"'], "ray", "ray.address"),
        (["workers.count=1"], "inline", "one core"),
        (["workers.count=2", "cohort.size=3"], "inline", "3 clients"),
        (["workers.count=2", "device=cuda"], "inline", "GPU"),
        (["workers.count=2", *FOUR], "workers", "2 processes, 4 clients"),
    ],
)
def test_auto_says_which_engine_and_why(tmp_path: Path, options: list[str], engine: str, why: str) -> None:
    chosen, said = settled(tiny(tmp_path, "engine=auto", "device=cpu", *options))
    assert chosen.engine == engine
    assert said is not None
    assert why in said
    assert settled(chosen) == (chosen, None)
