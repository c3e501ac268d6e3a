"""Workers that add up updates: the same bits as inline, whichever engine, workers, failures and stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from federation import TINY, same
from interruption import KillAfter, Killed
from one_ray import end, start

from fl_sim import Experiment, Report, load, local_sgd, run, snapshot
from fl_sim.communication.exchange import Exchange
from fl_sim.core.observer import Silent
from fl_sim.core.types import Task, Update
from fl_sim.runtime.grids import scheduling
from fl_sim.runtime.grids.folding import Traffic
from fl_sim.runtime.grids.pool import PooledGrid
from fl_sim.runtime.grids.ray import RayGrid
from fl_sim.simulation import resume
from fl_sim.simulation.federation import Federation
from fl_sim.training.client import ClientContext
from strategies.sparse_server import SparseServer

COHORT, TASK = 20, 5
METHODS: Mapping[str, dict[str, object]] = {
    "dense": {"model": {"name": "cnn_bn"}},
    "topk": {
        "client": {"target": "clients.presets:topk", "density": 0.9},
        "wire": {"error_feedback": True},
        "cohort": {"size": 24},
    },
    "pruned": {"strategy": {"target": "strategies.presets:gradual_magnitude", "density": 0.8, "end": 2}},
    "delta": {"wire": {"uplink": {"values": "float32-delta"}}},
    "difference": {
        "wire": {"uplink": {"values": "float16", "content": "difference"}, "downlink": {"values": "float16"}}
    },
    "equal": {"strategy": {"target": "strategies.presets:fedavg", "aggregate": "equal", "momentum": 0.9}},
    "adam": {"strategy": "strategies.presets:fedadam"},
    "broadcast": {"wire": {"broadcast": {"density": 0.5}, "uplink": {"content": "difference"}}},
}


@pytest.fixture(autouse=True)
def small_cohorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohorts of some clients are large; only the server's process asks."""
    monkeypatch.setattr(SparseServer, "exact_from", 10)
    for name in ("CLIENTS", "MANY_CLIENTS"):
        monkeypatch.setattr(scheduling, name, TASK)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    """What the workers of a test sent."""
    counted, made = Traffic(), PooledGrid.__init__

    def counting(self: PooledGrid, *given: object, **options: object) -> None:
        made(self, *given, **options)  # type: ignore[arg-type]
        self.traffic = counted

    monkeypatch.setattr(PooledGrid, "__init__", counting)
    return counted


def sums_in(traffic: Traffic, report: Report) -> int:
    """Sums that have come: 8 bytes a parameter, and a little for BatchNorm statistics and what had to be exact."""
    return int(traffic.sums_bytes / (8 * int(str(report.summary["params"]))))


def experiment(out: Path, method: str, **tree: object) -> Experiment:
    data = {"source": "digits", "clients": 30, "partition": "dirichlet", "alpha": 1.0}
    small = {**TINY, "data": data, "cohort": {"size": COHORT}, "model": {"name": "mlp", "width": 0.25}}
    return Experiment.from_tree({**small, **METHODS[method], **tree, "out": str(out)})


def on(engine: str, count: int) -> dict[str, object]:
    return {"engine": engine, engine: {"count" if engine == "workers" else "workers": count}}


@pytest.mark.parametrize("method", METHODS)
def test_sums_of_workers_have_the_bits_of_inline(tmp_path: Path, method: str, traffic: Traffic) -> None:
    inline = run(experiment(tmp_path / "inline", method))
    same(inline, run(experiment(tmp_path / "workers", method, **on("workers", 2))))
    assert traffic.folded >= traffic.replies / 2
    assert traffic.sums_bytes < traffic.kept_bytes


def huge(task: Task, ctx: ClientContext) -> Update:
    """Ones, but of one client 2^54 and of another the negative of it, beside which ones are lost."""
    value = {task.config["plus"]: 2.0**54, task.config["minus"]: -(2.0**54)}.get(ctx.num_examples, 1.0)
    return Update({name: torch.full_like(old, value) for name, old in task.params.items()}, ctx.num_examples)


def test_no_addition_rounds_on_any_engine(tmp_path: Path, traffic: Traffic) -> None:
    first, *_, last = victims(tmp_path / "v", number=1)
    tree = {
        "model": {"name": "mlp", "width": 0.25},
        "client": {"target": f"{__name__}:huge", "plus": first, "minus": last},
        "strategy": {"target": "strategies.presets:fedavg", "aggregate": "equal"},
        "rounds": 1,
    }
    inline = run(experiment(tmp_path / "inline", "dense", **tree))
    traffic.folded = 0
    same(inline, run(experiment(tmp_path / "workers", "dense", **tree, **on("workers", 3))))
    assert traffic.folded == COHORT
    assert {float(value) for each in inline.params.values() for value in each.flatten()} == {
        float(torch.tensor((COHORT - 2) / COHORT))
    }


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_workers(tmp_path: Path, count: int, traffic: Traffic) -> None:
    inline = run(experiment(tmp_path / "inline", "dense", rounds=1))
    same(inline, run(experiment(tmp_path / "workers", "dense", rounds=1, **on("workers", count))))
    assert (traffic.folded, traffic.replies) == (20, 20)
    assert sums_in(traffic, inline) == count, "one sum of each worker"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("method", "count"), [("dense", 1), ("dense", 2), ("topk", 2), ("delta", 2)])
def test_the_same_on_ray(tmp_path: Path, method: str, count: int, traffic: Traffic, ray_cluster: None) -> None:
    inline = run(experiment(tmp_path / "inline", method))
    same(inline, run(experiment(tmp_path / "ray", method, **on("ray", count))))
    assert traffic.folded >= traffic.replies / 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tasks_of_two_clients_are_added_up_too(tmp_path: Path, traffic: Traffic, ray_cluster: None) -> None:
    inline = run(experiment(tmp_path / "inline", "dense"))
    single = {"engine": "ray", "ray": {"workers": 2, "clients_per_task": 2}}
    same(inline, run(experiment(tmp_path / "single", "dense", **single)))
    assert traffic.folded == traffic.replies


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["dense", "topk", "difference"])
def test_what_neighbours_have_put_aside_is_handed_in_by_one(
    tmp_path: Path, method: str, traffic: Traffic, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RayGrid, "place", lambda self, worker: "a machine")  # whose sums are all in one store
    inline = run(experiment(tmp_path / "inline", method))
    same(inline, run(experiment(tmp_path / "ray", method, **on("ray", 2))))
    assert traffic.folded == traffic.replies
    if method == "dense":
        assert sums_in(traffic, inline) == len(inline.rounds), "one sum a round"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start("ray")
    yield
    end()


@pytest.mark.parametrize(
    ("method", "tree"),
    [
        ("topk", {"client": {"target": "clients.presets:topk", "density": 0.05}}),  # smaller than sums with covers
        ("dense", {"wire": {"record_masks": True}}),
        ("dense", {"wire": {"record_payloads": 1}}),
        ("dense", {"network": {"links": {"4G": 1}}}),
        ("dense", {"strategy": {"target": "strategies.presets:fedavg", "aggregate": "median"}}),
        ("dense", {"strategy": {"target": "strategies.presets:fedavg", "clip": 1.0}}),
        ("dense", {"strategy": "strategies.presets:scaffold", "client": "clients.presets:scaffold"}),
        ("dense", {"cohort": {"size": 9}}),  # not large
    ],
)
def test_updates_travel_where_sums_do_not_do(
    tmp_path: Path, method: str, tree: dict[str, object], traffic: Traffic
) -> None:
    inline = run(experiment(tmp_path / "inline", method, **tree))
    same(inline, run(experiment(tmp_path / "workers", method, **tree, **on("workers", 2))))
    assert (traffic.folded, traffic.kept_bytes, traffic.sums_bytes) == (0, 0, 0)
    assert traffic.payload_bytes >= inline.ledger.total(by=("direction", "phase"))["up", "train"]


def test_sums_that_are_large_stay_with_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traffic: Traffic
) -> None:
    monkeypatch.setattr("fl_sim.runtime.grids.workers.WorkersGrid.sums_bytes", 1000)
    run(experiment(tmp_path, "dense", **on("workers", 2)))
    assert traffic.folded == 0


# -- failures ----------------------------------------------------------------------------------------------------------


def faulty(task: Task, ctx: ClientContext) -> Update:
    """Trains; in round 2 one client raises, another sends bytes that are no update, and one may kill its process."""
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    faults = [key for key in ("raises", "spoils", "dies") if task.round == 2 and ctx.num_examples == task.config[key]]
    if faults == ["raises"]:
        raise ValueError("out of order")
    if faults == ["dies"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if faults == ["spoils"]:
        whole = Exchange.encode_up

        def shortened(self: Exchange, update: Update, task: Task, *, seed: int, state: object = None) -> bytes:
            Exchange.encode_up = whole  # type: ignore[method-assign]
            return whole(self, update, task, seed=seed)[:-1]

        Exchange.encode_up = shortened  # type: ignore[method-assign, assignment]
    return Update(snapshot(model), ctx.num_examples, metrics={"seen": 1.0})


def victims(out: Path, number: int = 2) -> list[int]:
    """Numbers of examples of the clients of a round that no other client has."""
    report = run(experiment(out, "dense", rounds=number))
    cohort = sorted({row["client"] for row in report.ledger.to_table().to_pylist() if row["round"] == number})
    sizes = [len(part) for part in Federation.build(experiment(out, "dense")).partitions]
    return [sizes[client] for client in cohort if sizes.count(sizes[client]) == 1]


def faults(first: int, second: int, third: int = -1) -> dict[str, object]:
    client = {"target": f"{__name__}:faulty", "raises": first, "spoils": second, "dies": third}
    return {"client": client, "rounds": 3}


@pytest.fixture(params=["workers", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine whose workers add up, with the cluster that it needs."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return str(request.param)


@pytest.mark.parametrize("last", [0, 1])
def test_failed_clients_are_left_out_of_a_sum(tmp_path: Path, last: int, engine: str, traffic: Traffic) -> None:
    """`last`: which client raises, and which sends no update."""
    found = victims(tmp_path / "v")
    tree = faults(found[-1 - last], found[last - 2])
    inline = run(experiment(tmp_path / "inline", "dense", **tree))
    assert [row["clients"] for row in inline.rounds] == [20, 18, 20]
    assert inline.summary["failures"] == {"raised": 1, "rejected": 1, "late": 0, "lost": 0}
    traffic.folded = 0
    same(inline, run(experiment(tmp_path / engine, "dense", **tree, **on(engine, 1))))
    assert traffic.folded == 59, "all but the one that raised"


def test_a_task_whose_worker_is_killed_runs_client_by_client(tmp_path: Path, engine: str, traffic: Traffic) -> None:
    found = victims(tmp_path / "v")
    lost = run(experiment(tmp_path / "lost", "dense", **faults(-1, -1, found[0]), **on(engine, 1)))
    assert lost.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 1}
    assert 60 - TASK <= traffic.folded < 60, "all but the task"
    raised = run(experiment(tmp_path / "raised", "dense", **faults(found[0], -1)))
    assert lost.summary["params_sha256"] == raised.summary["params_sha256"]
    assert lost.ledger.to_table().equals(raised.ledger.to_table())


class Killing(Silent):
    """Kills a worker once so many clients of a round have answered."""

    def __init__(self, folder: Path, answered: int) -> None:
        self.folder, self.answered, self.killed = folder, answered, False

    def reply(self, answered: int, cohort: int) -> None:
        if answered == self.answered and not self.killed:
            self.killed = True
            os.kill(int(max(self.folder.iterdir(), key=lambda path: path.stat().st_mtime).name), signal.SIGKILL)


def registering(task: Task, ctx: ClientContext) -> Update:
    """Leaves its process id in a folder."""
    Path(str(task.config["folder"]), str(os.getpid())).touch()
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples)


@pytest.mark.parametrize("answered", [1, 12])
def test_a_worker_that_somebody_kills_costs_nothing(
    tmp_path: Path, answered: int, engine: str, traffic: Traffic
) -> None:
    """Clients that have answered run again with what they kept before, since their sum was lost."""
    (folder := tmp_path / "ids").mkdir()
    client = {"client": {"target": f"{__name__}:registering", "folder": str(folder)}}
    tree = {**client, "wire": {"error_feedback": True, "uplink": {"values": "float16", "content": "difference"}}}
    killing = Killing(folder, answered)
    report = run(experiment(tmp_path / "killed", "dense", **tree, **on(engine, 2)), killing)
    assert killing.killed
    assert 20 < traffic.folded <= 40
    same(run(experiment(tmp_path / "inline", "dense", **tree)), report)


def test_a_sum_that_is_handed_in_in_a_round_is_not_lost(
    tmp_path: Path, engine: str, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    for least in ("HAND_IN_S", "TIMES_ITS_WAY"):  # after every task
        monkeypatch.setattr(f"fl_sim.runtime.grids.running_sums.{least}", 0.0)
    inline = run(experiment(tmp_path / "inline", "dense"))
    same(inline, run(experiment(tmp_path / engine, "dense", **on(engine, 2))))
    assert sums_in(traffic, inline) > 2 * len(inline.rounds), "more than one of each worker and round"


@pytest.mark.parametrize(("method", "replies"), [("dense", 7), ("topk", 0)])
def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, method: str, replies: int, engine: str, traffic: Traffic
) -> None:
    with pytest.raises(Killed):
        run(experiment(tmp_path / "b", method, **on(engine, 2)), KillAfter(1, replies))
    resumed = resume(experiment(tmp_path / "b", method, **on(engine, 2)))
    assert traffic.folded
    same(run(experiment(tmp_path / "a", method)), resumed)


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_the_user_is_told_once(tmp_path: Path) -> None:
    class Listening(Silent):
        def say(self, line: str) -> None:
            lines.append(line)

    lines: list[str] = []
    run(experiment(tmp_path, "dense", **on("workers", 1)), Listening())
    (said,) = [line for line in lines if "added up" in line]
    assert said.startswith("round 1: 20 of 20 updates were added up where they were made: ")
