"""Clients that misbehave: the round goes on, the ledger books the waste, the log says who and why; too many stop the run."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from federation import TINY, tiny
from misbehaviour import FAULTS, KINDS

from fl_sim import Experiment, load, local_sgd, run, snapshot
from fl_sim.core.types import Task, Update, UserError
from fl_sim.runtime.grids.faults import Overdue, alarm
from fl_sim.simulation import RunStopped, resume
from fl_sim.simulation.federation import Federation
from fl_sim.training.client import ClientContext


def faulty(task: Task, ctx: ClientContext) -> Update:
    """An honest client, but in round `at` the one with `victim` examples does what `fault` says."""
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, steps=1, rng=ctx.rng)
    update = Update(snapshot(model), ctx.num_examples, metrics={"loss": 1.0})
    if task.round == task.config["at"] and ctx.num_examples == task.config["victim"]:
        return FAULTS[str(task.config["fault"])](update)  # type: ignore[return-value]
    return update


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """(partition, number of examples) of a client whose number of examples no other has."""
    sizes = [len(part) for part in Federation.build(tiny(tmp_path_factory.mktemp("x"))).partitions]
    partition = next(i for i, size in enumerate(sizes) if sizes.count(size) == 1)
    return partition, sizes[partition]


def experiment(out: Path, fault: str, victim: int, *overrides: str) -> Experiment:
    client = {"target": f"{__name__}:faulty", "fault": fault, "victim": victim, "at": 2}
    tree = {**TINY, "client": client, "cohort": {"size": 6}, "rounds": 3}
    return Experiment.from_tree(tree, [f'out="{out}"', *overrides])


@pytest.mark.parametrize("fault", FAULTS)
def test_one_faulty_client_costs_one_update(
    tmp_path: Path, fault: str, victim: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    limit = "faults.timeout_s=1" if fault in ("hangs", "spins") else "seed=0"
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "fl_sim"):
        report = run(experiment(tmp_path, fault, victim[1], limit))
    assert time.monotonic() - start < 20
    assert [row["clients"] for row in report.rounds] == [6, 5, 6]
    kind = KINDS.get(fault, "raised")
    assert report.summary["failures"] == {**dict.fromkeys(("raised", "rejected", "late", "lost"), 0), kind: 1}
    assert f"round 2: client {victim[0]}: " in caplog.text
    messages = report.ledger.messages(phase="train")
    assert messages == {"down": 18, "up": 17}
    assert all(torch.isfinite(value).all() for value in report.params.values())


def mostly_failing(task: Task, ctx: ClientContext) -> Update:
    """From round 2 on, all but the largest client fail, unless the file `cured` names exists."""
    if task.round >= 2 and ctx.num_examples < 250 and not Path(str(task.config["cure"])).exists():
        raise ValueError("ill")
    return Update(dict(task.params), ctx.num_examples)


def test_too_many_failures_stop_the_run_which_can_go_on_once_cured(tmp_path: Path) -> None:
    cure = tmp_path / "cured"
    tree = {**TINY, "client": {"target": f"{__name__}:mostly_failing", "cure": str(cure)}, "cohort": {"size": 6}}
    asked = Experiment.from_tree(tree, [f'out="{tmp_path}"'])
    with pytest.raises(RunStopped) as caught:
        run(asked)
    said = str(caught.value)
    for words in (
        "round 2",
        "of 6 clients failed",
        "faults.max_share allows 0.5",
        "ill",
        "1 finished rounds",
        "--resume",
    ):
        assert words in said
    assert "\n" not in said
    cure.touch()
    assert [row["clients"] for row in resume(asked).rounds] == [6, 6]


def test_more_failures_are_allowed_on_request(tmp_path: Path) -> None:
    tree = {**TINY, "client": {"target": f"{__name__}:mostly_failing", "cure": "/none"}, "cohort": {"size": 6}}
    report = run(Experiment.from_tree(tree, [f'out="{tmp_path}"', "faults.max_share=1"]))
    assert 0 < report.rounds[1]["clients"] < 3


def test_simulated_dropout_is_no_fault(tmp_path: Path) -> None:
    options = ["network.links.3G=1", "network.dropout=0.6", "cohort.size=6", "faults.max_share=0"]
    report = run(tiny(tmp_path, *options))
    assert report.summary["failures"]["lost"] > 0


def test_a_time_limit_needs_the_main_thread(tmp_path: Path, victim: tuple[int, int]) -> None:
    told: list[BaseException] = []

    def elsewhere() -> None:
        try:
            run(experiment(tmp_path, "raises", victim[1], "faults.timeout_s=5"))
        except UserError as error:
            told.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(told[0])


def test_a_time_limit_is_not_for_clients_that_train_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"faults\.timeout_s"):
        run(tiny(tmp_path, "engine=cohort", "faults.timeout_s=5"))


@pytest.mark.parametrize("override", ["faults.max_share=2", "faults.timeout_s=0", "checkpoint.every=-1"])
def test_impossible_limits_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        tiny(tmp_path, override)


def test_an_alarm_that_a_client_swallows_rings_again() -> None:
    swallowed: list[float] = []

    def sleep_through_alarms() -> None:
        with alarm(0.05):
            while len(swallowed) < 2:
                started = time.monotonic()
                with suppress(BaseException):
                    time.sleep(5)
                swallowed.append(time.monotonic() - started)

    with pytest.raises(Overdue):
        sleep_through_alarms()
    assert len(swallowed) == 2
    assert max(swallowed) < 4


def test_who_swallowed_the_alarm_and_answered_is_late_all_the_same() -> None:
    with pytest.raises(Overdue), alarm(0.05), suppress(BaseException):
        time.sleep(5)
