"""The model of a round on a cluster: laws it keeps, the command's output, and one line where the input is wrong."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from command import cli_here

from fl_sim import Experiment
from fl_sim.bench import cluster_costs
from fl_sim.bench.cluster_model import Cluster, Costs, is_folded, memory_of, round_on, tasks_of
from fl_sim.runtime.grids import costs as seconds
from fl_sim.runtime.grids import dispatch
from fl_sim.runtime.grids.running_sums import hand_in_after
from fl_sim.runtime.grids.scheduling import Limits
from fl_sim.runtime.grids.worker import Job

COSTS = Costs(
    fit_s=0.5,
    longest_s=0.6,
    task_s=0.002,
    begin_s=0.02,
    fold_s=0.004,
    send_s=0.001,
    end_s=0.03,
    start_s=5.0,
    down_bytes=1e6,
    up_bytes=4e5,
    broadcasts=1,
    state_bytes=0.0,
    driver_bytes=7e8,
    worker_bytes=6e8,
    samples_bytes=1e4,
    client_bytes=50.0,
    client_s=1e-5,
    clients=100,
)
COHORT = 120


def test_a_lone_head_sends_nothing_over_a_link() -> None:
    alone = round_on(COSTS, Cluster(1, 2, 0.001), COHORT)
    assert (alone.node_down, alone.node_up, alone.head_down, alone.head_up, alone.link_s) == (0, 0, 0, 0, 0)
    assert alone.bound == "compute"
    assert alone.compute_s == pytest.approx(60 * 0.5 + 8 * 0.002)
    assert alone.seconds == pytest.approx(0.02 + alone.compute_s + 0.005 - 0.001 + 0.03)


def test_a_broadcast_crosses_once_to_each_other_node_and_every_reply_from_there_once() -> None:
    four = round_on(COSTS, Cluster(4, 1, 1000), COHORT)
    assert (four.node_down, four.node_up) == (1e6, 30 * 4e5)
    assert (four.head_down, four.head_up) == (3e6, 90 * 4e5)
    assert four.link_s == pytest.approx(8 * (3e6 + 90 * 4e5) / 1e9)


def test_a_broadcast_of_its_own_for_each_client_and_what_clients_keep_cross_for_each() -> None:
    own = round_on(replace(COSTS, broadcasts=0, state_bytes=1e3), Cluster(4, 1, 1000), COHORT)
    assert own.node_down == 30 * (1e6 + 1e3)
    assert own.node_up == 30 * (4e5 + 1e3)


FOLDED = replace(
    COSTS,
    fit_s=0.01,
    longest_s=0.01,
    up_bytes=4e6,
    sums_bytes=8e6,
    folded_s=0.008,
    receipt_s=1e-5,
    add_s=0.001,
)


def test_one_sum_of_each_other_node_crosses_in_the_place_of_its_clients_uploads() -> None:
    cohort = 256
    four, single = (round_on(costs, Cluster(4, 2, 1000), cohort) for costs in (FOLDED, replace(FOLDED, sums_bytes=0.0)))
    assert (single.head_up, four.head_up) == (3 * 64 * 4e6, 3 * 8e6)
    tasks = tasks_of(FOLDED, 8, cohort)
    assert four.driver_s == pytest.approx(0.02 + 256 * 1e-5 + tasks * 0.001 + (2 + 3) * 0.001 + 0.03)
    assert four.compute_s == pytest.approx(32 * 0.008 + math.ceil(tasks / 8) * 0.002)
    joining_s, crossing_s = 2 * 0.001, 3 * 8e6 * 8 / 1e9
    assert four.seconds == pytest.approx(0.02 + 3 * 8e6 / 1e9 + four.compute_s + 1e-5 + joining_s + crossing_s + 0.03)


def test_in_a_long_round_more_sums_cross() -> None:
    long = round_on(replace(FOLDED, folded_s=1.0), Cluster(2, 1, 1000), 256)
    assert long.head_up == (1 + int(long.compute_s / hand_in_after(8e6))) * 8e6
    assert long.compute_s == pytest.approx(128, rel=0.02)


@pytest.mark.parametrize(
    ("costs", "workers", "folded"),
    [
        (FOLDED, 1, True),
        (FOLDED, 125, True),  # two of their models are the sum
        (FOLDED, 126, False),
        (replace(FOLDED, up_bytes=8e6 / 250), 1, True),
        (replace(FOLDED, up_bytes=8e6 / 251), 1, False),  # all uploads are smaller
        (replace(FOLDED, sums_bytes=0.0), 1, False),
    ],
)
def test_workers_add_up_where_their_uploads_are_larger_than_the_sum(costs: Costs, workers: int, folded: bool) -> None:
    assert is_folded(costs, workers, 250) is folded


def test_a_node_without_a_client_fetches_nothing() -> None:
    assert round_on(COSTS, Cluster(1000, 1, 1000), 10).head_down == pytest.approx(999 * 10 / 1000 * 1e6)


def test_each_part_can_be_what_bounds_a_round() -> None:
    assert round_on(COSTS, Cluster(2, 1, 1000), COHORT).bound == "compute"
    assert round_on(replace(COSTS, fit_s=0.001, longest_s=0.001), Cluster(2, 1, 1000), COHORT).bound == "driver"
    slow = round_on(COSTS, Cluster(20, 4, 5), COHORT)
    assert slow.bound == "link"
    assert slow.seconds > slow.link_s


def test_more_nodes_compute_no_longer_and_never_faster_than_the_slowest_client() -> None:
    seconds = [round_on(COSTS, Cluster(nodes, 2, 1e6), COHORT).compute_s for nodes in range(1, 200)]
    assert all(later <= before + 0.01 for before, later in itertools.pairwise(seconds))
    assert seconds[-1] >= 0.6


@pytest.mark.parametrize("fit_s", [0.0003, 0.013, 1.0])
@pytest.mark.parametrize("workers", [1, 3, 40])
@pytest.mark.parametrize("cohort", [1, 10, 700])
@pytest.mark.parametrize("weight", [1000, 9_000_000])
@pytest.mark.parametrize("folds", [False, True])
def test_the_model_cuts_a_round_as_the_engine_does(
    fit_s: float, workers: int, cohort: int, weight: int, folds: bool
) -> None:
    costs = seconds.Costs([1] * cohort)
    for partition in range(cohort):
        costs.learn("train", partition, fit_s)
    grid, limits = SimpleNamespace(costs=costs, width=workers), Limits(None, weight, folds)
    jobs = [Job(i, i + 1000, "train", "", "", 0, int(folds)) for i in range(cohort)]
    groups = dispatch.Round._groups(cast(dispatch.Round, SimpleNamespace(grid=grid, limits=limits)), jobs)
    planned = replace(COSTS, fit_s=fit_s, folded_s=fit_s, down_bytes=weight, sums_bytes=float(folds))
    assert tasks_of(planned, workers, cohort) == len(groups)


def test_memory_grows_with_clients_and_is_held_by_every_worker() -> None:
    cluster = Cluster(3, 4, 1000)
    own, many = memory_of(COSTS, cluster, 100), memory_of(COSTS, cluster, 1_000_100)
    assert (own.driver_bytes, own.node_bytes, own.start_s) == (7e8, 4 * 6e8, 5.0)
    assert many.driver_bytes - own.driver_bytes == pytest.approx(1e6 * (1e4 + 50))
    assert many.node_bytes - own.node_bytes == pytest.approx(4e6 * 1e4)
    assert many.start_s == pytest.approx(15.0)
    assert memory_of(replace(COSTS, state_bytes=10.0), cluster, 1000).states_bytes == 1e4


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--nodes", "0"], "--nodes 0: must be from 1 to 100000"),
        (["--nodes", "1,many"], "--nodes '1,many': write integers"),
        (["--workers", "0"], "--workers 0: must be from 1"),
        (["--mbps", "0"], "--mbps 0: must be above 0"),
        (["--mbps", "nan"], "--mbps nan: must be above 0"),
        (["--clients", "3"], "--clients 3: must be from 10 (a round's cohort)"),
        (["rounds=1"], "rounds = 1: a plan needs 2 rounds at least"),
        (["ronds=1"], "did you mean 'rounds'"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_here(monkeypatch, "plan", "configs/quickstart.toml", *words) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("config", ["configs/kd_capacity.toml", "configs/digits_fedbuff.toml", "configs/none.toml"])
def test_a_config_that_has_no_rounds_is_one_line(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_here(monkeypatch, "plan", config) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_the_short_run_agrees_with_its_ledger_and_the_model_with_the_short_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "echo.toml"
    config.write_text('client = "fl_sim.bench.workloads:echo"\n[data]\nsource = "digits"\nclients = 20\n')
    options = ["model.name=cnn_bn", "wire.error_feedback=false", "--nodes", "1,3", "--workers", "1"]
    assert cli_here(monkeypatch, "plan", str(config), *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    costs = found["measured"]["costs"]
    assert costs["broadcasts"] == 1
    assert costs["down_bytes"] == pytest.approx(costs["up_bytes"], rel=0.01)
    assert all(value >= 0 and math.isfinite(value) for value in costs.values() if value is not None)
    assert [each["nodes"] for each in found["rounds"]] == [1, 3]
    assert found["rounds"][1]["head_down"] == 2 * costs["down_bytes"]
    assert [each["clients"] for each in found["memory"]] == [20, 10**4, 10**5, 10**6, 10**7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "folds"),
    [
        ((), True),
        (("ray.clients_per_task=8",), True),
        (("strategy.aggregate=median",), False),
        (("cohort.size=120",), False),
    ],
    ids=["mean", "short tasks", "median", "small cohort"],
)
def test_folding_is_measured_where_workers_add_up_updates(
    more: tuple[str, ...],
    folds: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "echo.toml"
    data = '[data]\nsource = "digits"\npartition = "iid"\nclients = 200\n[cohort]\nsize = 160\n'
    config.write_text('client = "fl_sim.bench.workloads:echo"\nstrategy.target = "strategies.presets:fedavg"\n' + data)
    assert cli_here(monkeypatch, "plan", str(config), "--nodes", "1", *more, "--json") == 0
    costs = json.loads(capsys.readouterr().out)["measured"]["costs"]
    assert (costs["sums_bytes"] > 1.9 * costs["up_bytes"]) is folds
    assert (0 < costs["folded_s"] < costs["fit_s"] + costs["fold_s"]) is folds
    assert (0 < costs["receipt_s"] < costs["fold_s"]) is folds


def test_the_short_run_keeps_the_bytes_of_a_payload_under_a_budget(tmp_path: Path) -> None:
    overrides = ["cohort.size=20", "wire.budget.megabytes=0.5", "wire.uplink.content=difference", "evaluate.clients=0"]
    whole = Experiment.load("configs/quickstart.toml", overrides)
    short = cluster_costs._short(whole, str(tmp_path))
    assert short.cohort.size == 8
    assert short.wire.budget is not None
    assert short.wire.budget.megabytes == pytest.approx(0.2)
