"""Clients that fail to evaluate: some are counted in the round's row, and a run in which none answers stops."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from federation import TINY
from flwr.app import Message, MetricRecord, RecordDict

from clients.local import LocalClient
from fl_sim import Experiment, Report, run
from fl_sim.communication import messages as wire
from fl_sim.core.types import Task
from fl_sim.simulation import RunStopped
from fl_sim.simulation.federation import Federation
from fl_sim.training import Training
from fl_sim.training.client import Client, ClientContext
from strategies.client_evaluation import measured
from strategies.round_log import RoundLog, Unusable

FEDBUFF = ("schedule.kind=fedbuff", "schedule.buffer=3", "network.links.4G=1", "evaluate.clients=3")
TWO_SIZES = ('capacities=[{name="cnn_bn", width=0.25, share=0.5}]',)


def picky(*, training: Training, least: int) -> Client:
    """A client that evaluates only where it has at least so many samples."""

    def personalise(task: Task, ctx: ClientContext) -> None:
        if ctx.num_examples < least:
            raise ValueError(f"{ctx.num_examples} are not enough")

    return LocalClient(training, before_evaluation=personalise)


def asked(out: Path, least: int, *overrides: str) -> Experiment:
    client = {"target": f"{__name__}:picky", "least": least}
    return Experiment.from_tree({**TINY, "client": client, "evaluate": {"clients": 6}}, [f'out="{out}"', *overrides])


def failures(report: Report) -> list[float]:
    return [row.get("evaluation_failures", 0) for row in report.rounds]


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Samples of the six clients, ascending."""
    return sorted(len(part) for part in Federation.build(asked(tmp_path_factory.mktemp("x"), 0), quiet=True).partitions)


@pytest.mark.parametrize("overrides", [(), FEDBUFF, TWO_SIZES])
def test_a_run_whose_clients_all_fail_to_evaluate_stops_and_names_the_first_reason(
    overrides: Sequence[str], tmp_path: Path
) -> None:
    with pytest.raises(
        RunStopped, match=r"round 1: none of [36] clients evaluated the model: client .* are not enough"
    ):
        run(asked(tmp_path, 10**6, *overrides))


def test_clients_that_fail_to_evaluate_are_counted_and_the_others_metrics_are_those_without_them(
    tmp_path: Path, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    missing = sum(size < sizes[2] for size in sizes)
    assert missing
    with caplog.at_level(logging.WARNING, "fl_sim"):
        report, whole = run(asked(tmp_path / "a", sizes[2])), run(asked(tmp_path / "b", 0))
    assert failures(report) == [missing, missing]
    assert caplog.text.count(": evaluation: client ") == 2 * missing
    assert not any(report.summary["failures"].values())
    assert report.summary["params_sha256"] == whole.summary["params_sha256"]
    assert report.ledger.messages(phase="evaluate") == {"down": 12, "up": 12 - 2 * missing}
    assert not any("evaluation_failures" in row for row in whole.rounds)
    assert {*report.rounds[0]} == {*whole.rounds[0], "evaluation_failures"}


def test_of_several_models_they_are_summed(tmp_path: Path, sizes: list[int]) -> None:
    report = run(asked(tmp_path, sizes[1], *TWO_SIZES))
    assert sizes[0] < sizes[1]
    assert failures(report) == [1, 1]


def test_without_rounds_they_are_counted_too(tmp_path: Path, sizes: list[int]) -> None:
    report = run(asked(tmp_path, sizes[1], *FEDBUFF, "rounds=6"))
    answered = report.ledger.messages(phase="evaluate")
    assert sum(failures(report)) == answered["down"] - answered["up"] > 0


def test_metrics_that_are_none_are_rejected() -> None:
    content = RecordDict({wire.METRICS: MetricRecord({"loss": 1.0, wire.NUM_EXAMPLES: -3})})
    wrong = cast("Message", SimpleNamespace(content=content, has_error=lambda: False))
    with pytest.raises(Unusable, match=r"client 4: rejected metrics: .*-3"):
        measured(4, wrong)


def test_an_evaluation_that_nobody_answered_in_time_says_so() -> None:
    with pytest.raises(
        RuntimeError, match="round 3: none of 2 clients evaluated the model: no client answered in time"
    ):
        RoundLog().require_any(3, 2, "evaluated the model")
