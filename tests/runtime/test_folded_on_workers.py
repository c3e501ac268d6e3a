"""Workers that add up the updates of a block: the same bits as inline, whichever engine, workers, failures and stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from federation import TINY, same
from hypothesis import given
from hypothesis import strategies as st
from interruption import KillAfter, Killed
from one_ray import end, start

from fl_sim import Experiment, load, local_sgd, run, snapshot
from fl_sim.communication.exchange import Exchange
from fl_sim.core.observer import Silent
from fl_sim.core.types import Task, Update
from fl_sim.runtime.grids import scheduling
from fl_sim.runtime.grids.folding import Traffic
from fl_sim.runtime.grids.pool import PooledGrid
from fl_sim.runtime.grids.scheduling import computes_longer, evenly, whole
from fl_sim.simulation import resume
from fl_sim.simulation.federation import Federation
from fl_sim.training.client import ClientContext
from strategies import blocks

COHORT, BLOCK = 20, 5
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
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohorts of some clients are cut; only the server's process asks how."""
    for name, value in {"LEAST": 10, "SMALLEST": BLOCK, "LARGEST": BLOCK}.items():
        monkeypatch.setattr(blocks, name, value)
    monkeypatch.setattr(scheduling, "LINK", 1.0)  # so slow that it counts what crosses


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    """What the workers of a test sent."""
    counted, made = Traffic(), PooledGrid.__init__

    def counting(self: PooledGrid, *given: object, **options: object) -> None:
        made(self, *given, **options)  # type: ignore[arg-type]
        self.traffic = counted

    monkeypatch.setattr(PooledGrid, "__init__", counting)
    return counted


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


def test_sums_that_round_show_the_blocks_on_every_engine(tmp_path: Path, traffic: Traffic) -> None:
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
    assert 0 < traffic.folded < COHORT, "workers add up some blocks, and the program another"

    sizes = [len(part) for part in Federation.build(experiment(tmp_path, "dense")).partitions]
    clients = sorted({row["client"] for row in inline.ledger.to_table().to_pylist()})
    sent = [{first: 2.0**54, last: -(2.0**54)}.get(sizes[client], 1.0) for client in clients]
    added = partial(reduce, float.__add__)
    in_blocks = added([added(sent[at : at + BLOCK]) for at in range(0, COHORT, BLOCK)])
    assert in_blocks != added(sent)
    assert {float(value) for each in inline.params.values() for value in each.flatten()} == {
        float(torch.tensor(in_blocks / COHORT))
    }


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_workers(tmp_path: Path, count: int, traffic: Traffic) -> None:
    # One round: the next one deals blocks out by their measured seconds, which differ from run to run.
    inline = run(experiment(tmp_path / "inline", "dense", rounds=1))
    same(inline, run(experiment(tmp_path / "workers", "dense", rounds=1, **on("workers", count))))
    # Three workers share four blocks: one each, and the clients of the fourth one by one.
    assert (traffic.folded, traffic.replies) == ({1: 20, 3: 15}[count], 20)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("method", "count"), [("dense", 1), ("dense", 2), ("topk", 2), ("delta", 2)])
def test_the_same_on_ray(tmp_path: Path, method: str, count: int, traffic: Traffic, ray_cluster: None) -> None:
    inline = run(experiment(tmp_path / "inline", method))
    same(inline, run(experiment(tmp_path / "ray", method, **on("ray", count))))
    assert traffic.folded >= traffic.replies / 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tasks_of_two_clients_are_no_blocks(tmp_path: Path, traffic: Traffic, ray_cluster: None) -> None:
    inline = run(experiment(tmp_path / "inline", "dense"))
    single = {"engine": "ray", "ray": {"workers": 2, "clients_per_task": 2}}
    same(inline, run(experiment(tmp_path / "single", "dense", **single)))
    assert traffic.folded == 0


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start("ray")
    yield
    end()


@pytest.mark.parametrize(
    ("method", "tree"),
    [
        ("topk", {"client": {"target": "clients.presets:topk", "density": 0.45}}),  # smaller than sums with covers
        ("dense", {"wire": {"record_masks": True}}),
        ("dense", {"wire": {"record_payloads": 1}}),
        ("dense", {"network": {"links": {"4G": 1}}}),
        ("dense", {"strategy": {"target": "strategies.presets:fedavg", "aggregate": "median"}}),
        ("dense", {"strategy": {"target": "strategies.presets:fedavg", "clip": 1.0}}),
        ("dense", {"strategy": "strategies.presets:scaffold", "client": "clients.presets:scaffold"}),
        ("dense", {"cohort": {"size": 9}}),  # one block
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
def test_failed_clients_are_left_out_of_a_block(tmp_path: Path, last: int, engine: str, traffic: Traffic) -> None:
    """`last`: the one that raises comes after the others of its block, or before."""
    found = victims(tmp_path / "v")
    tree = faults(found[-1 - last], found[last - 2])
    inline = run(experiment(tmp_path / "inline", "dense", **tree))
    assert [row["clients"] for row in inline.rounds] == [20, 18, 20]
    assert inline.summary["failures"] == {"raised": 1, "rejected": 1, "late": 0, "lost": 0}
    traffic.folded = 0
    same(inline, run(experiment(tmp_path / engine, "dense", **tree, **on(engine, 1))))
    assert traffic.folded == 59, "all but the one that raised"


def test_a_block_whose_worker_is_killed_runs_client_by_client(tmp_path: Path, engine: str, traffic: Traffic) -> None:
    found = victims(tmp_path / "v")
    lost = run(experiment(tmp_path / "lost", "dense", **faults(-1, -1, found[0]), **on(engine, 1)))
    assert lost.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 1}
    assert traffic.folded == 55, "all but the block"
    raised = run(experiment(tmp_path / "raised", "dense", **faults(found[0], -1)))
    assert lost.summary["params_sha256"] == raised.summary["params_sha256"]
    assert lost.ledger.to_table().equals(raised.ledger.to_table())


class Killing(Silent):
    """Kills a worker once the first clients of a round have answered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.killed = folder, False

    def reply(self, answered: int, cohort: int) -> None:
        if answered == 1 and not self.killed:
            self.killed = True
            os.kill(int(max(self.folder.iterdir(), key=lambda path: path.stat().st_mtime).name), signal.SIGKILL)


def registering(task: Task, ctx: ClientContext) -> Update:
    """Leaves its process id in a folder."""
    Path(str(task.config["folder"]), str(os.getpid())).touch()
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples)


def test_a_worker_that_somebody_kills_costs_nothing(tmp_path: Path, engine: str, traffic: Traffic) -> None:
    (folder := tmp_path / "ids").mkdir()
    tree = {"client": {"target": f"{__name__}:registering", "folder": str(folder)}}
    killing = Killing(folder)
    report = run(experiment(tmp_path / "killed", "dense", **tree, **on(engine, 2)), killing)
    assert killing.killed
    assert 25 <= traffic.folded < 40
    same(run(experiment(tmp_path / "inline", "dense", **tree)), report)


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


@given(cohort=st.integers(0, 30_000))
def test_blocks_are_a_partition_of_the_cohort_and_small_ones_are_one_block(cohort: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LEAST": 128, "SMALLEST": 32, "LARGEST": 128}.items():
            patch.setattr(blocks, name, value)
        found = blocks.blocks_of(cohort)
    assert [place for block in found for place in block] == list(range(cohort))
    assert all(len(block) == len(found[0]) for block in found[:-1])
    assert len(found) <= 1 if cohort < 128 else 32 <= len(found[0]) <= 128
    assert all(a.stop == b.start for a, b in pairwise(found))


@given(costs=st.lists(st.floats(0.01, 1), min_size=1, max_size=40), workers=st.integers(1, 8))
def test_no_worker_gets_more_whole_blocks_than_its_share(costs: list[float], workers: int) -> None:
    for spare in (False, True):
        dealt, loads = evenly(costs, workers=workers, spare=spare), [0.0] * workers
        assert dealt == sorted(set(dealt))
        for position in dealt:
            loads[loads.index(min(loads))] += costs[position]
        assert max(loads) <= sum(costs) / workers + max(costs) / 4 + 1e-9
        if workers == 1:
            assert len(dealt) == len(costs)
        elif spare:
            assert max(loads) <= max(0.0, sum(costs) / workers - 0.75 * max(costs)) + 1e-9
    assert evenly([1.0] * 4, workers=3) == [0, 1, 2]
    assert evenly([1.0] * 8, workers=2, spare=True) == [0, 1, 2, 3, 4, 5]
    assert evenly([1.0, 1.1] * 4, workers=2) == [*range(8)]


def test_what_bounds_a_round_is_told_from_bytes_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "LINK", 125e6)
    assert computes_longer(1.0, 1.87e6, 2)
    assert not computes_longer(1.0, 1.87e6, 20), "twenty workers' replies take 0.3 s a second of computing"
    assert not computes_longer(float("inf"), 1.0, 1), "nobody has measured it yet"


def test_clients_that_take_less_time_than_their_replies_are_folded_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "LINK", 125e6)
    five = [1.0] * 5
    assert whole(five, workers=3, seconds=0.009, nbytes=1.25e6) == [0, 1, 2, 3, 4]
    assert whole(five, workers=3, seconds=0.011, nbytes=1.25e6) == evenly(five, workers=3) == [0, 1, 2]
    assert whole([1.0] * 8, workers=2, seconds=0.1, nbytes=1.25e6) == evenly([1.0] * 8, workers=2, spare=True)
    assert whole(five, workers=3, seconds=float("inf"), nbytes=1.25e6) == evenly(five, workers=3)


def test_long_clients_leave_a_blocks_time_for_small_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traffic: Traffic
) -> None:
    monkeypatch.setattr(scheduling, "LINK", 1e15)
    tree = {"data": {"source": "digits", "clients": 30, "partition": "iid"}, "rounds": 2}
    same(
        run(experiment(tmp_path / "a", "dense", **tree)),
        run(experiment(tmp_path / "b", "dense", **tree, **on("workers", 2))),
    )
    assert 20 <= traffic.folded < 40, "all of the first round, and fewer once it is known how long clients take"
