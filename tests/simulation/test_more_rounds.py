"""A run that was extended to more rounds is the longer run that was never interrupted, evaluations and `[stop]` included."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from federation import run_tiny, same, tiny
from interruption import KillAfter, Killed

from fl_sim import Report, run

QUARTER = ("model.name=mlp", "model.width=0.25", "training.steps=2", "evaluate.every=4")
"""Rounds 4, 8, ... are evaluated, and the last of a run."""
FEDBUFF = ["network.links.4G=1", 'schedule={kind="fedbuff", buffer=2, concurrency=4}']
UNDUE = "round 3: its evaluation counts for the shorter run alone"


def extended(out: Path, *options: str, rounds: tuple[int, ...]) -> tuple[Report, Report]:
    """The first of several runs, each of which goes on from the one before, and the last."""
    first = run_tiny(out, *options, f"rounds={rounds[0]}")
    for number in rounds[1:]:
        last = run(tiny(out, *options, f"rounds={number}"), resume=True)
    return first, last


@pytest.mark.parametrize(
    "options",
    [
        ["evaluate.metrics=['auc']", "evaluate.clients=2"],
        ["model.personal=head", "evaluate.clients=2"],
        ['capacities=[{name="cnn", share=0.5}]'],
        ["data.validation=0", "checkpoint.every=3"],
    ],
    ids=["metrics", "personal", "capacities", "no validation"],
)
def test_the_end_of_a_shorter_run_is_no_evaluation_of_a_longer_one(
    tmp_path: Path, options: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = run_tiny(tmp_path / "whole", *QUARTER, *options, "rounds=6")
    with caplog.at_level(logging.WARNING, "fl_sim"):
        shorter, longer = extended(tmp_path / "part", *QUARTER, *options, rounds=(3, 6))
    same(undisturbed, longer)
    assert [row["round"] for row in longer.rounds if "accuracy" in row] == [4, 6]
    assert UNDUE in caplog.text
    assert Report.load(shorter.folder).rounds == shorter.rounds
    assert "accuracy" in shorter.rounds[-1], "what the shorter run measured stays with it"


def test_a_run_may_be_extended_twice(tmp_path: Path) -> None:
    undisturbed = run_tiny(tmp_path / "whole", *QUARTER, "rounds=7")
    same(undisturbed, extended(tmp_path / "part", *QUARTER, rounds=(2, 3, 7))[1])


def test_an_extension_may_be_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed = run_tiny(tmp_path / "whole", *QUARTER, "rounds=7")
    run_tiny(tmp_path / "part", *QUARTER, "checkpoint.every=9", "rounds=3")
    longer = tiny(tmp_path / "part", *QUARTER, "rounds=7")
    with pytest.raises(Killed):
        run(longer, KillAfter(1), resume=True)
    assert UNDUE in caplog.text
    caplog.clear()
    same(undisturbed, run(longer, resume=True))
    assert UNDUE not in caplog.text, "the checkpoint of round 4 has the rows as they count"


def test_a_metric_that_only_the_shorter_run_measured_does_not_stop_the_longer_one(tmp_path: Path) -> None:
    reached = run_tiny(tmp_path / "probe", *QUARTER, "rounds=3").rounds[-1]["validation_accuracy"]
    options = (*QUARTER, f"stop.accuracy={reached}")
    undisturbed = run_tiny(tmp_path / "whole", *options, "rounds=8")
    shorter, longer = extended(tmp_path / "part", *options, rounds=(3, 8))
    assert str(shorter.summary["stopped"]).startswith("after round 3: validation accuracy")
    assert len(undisturbed.rounds) > 3
    same(undisturbed, longer)


def test_patience_counts_evaluations_that_the_longer_run_makes(tmp_path: Path) -> None:
    options = (*QUARTER, "evaluate.every=2", "training.lr=1e-9", "stop.patience=1")
    undisturbed = run_tiny(tmp_path / "whole", *options, "rounds=8")
    shorter, longer = extended(tmp_path / "part", *options, rounds=(3, 8))
    assert (shorter.summary["rounds"], longer.summary["rounds"]) == (3, 4)
    same(undisturbed, longer)


def test_a_run_that_stop_ended_ends_there_with_more_rounds_too(tmp_path: Path) -> None:
    options = (*QUARTER, "evaluate.every=2", "training.lr=1e-9", "stop.patience=1")
    shorter, longer = extended(tmp_path, *options, rounds=(6, 8))
    assert shorter.summary["stopped"] == longer.summary["stopped"]
    assert longer.rounds == shorter.rounds


@pytest.mark.parametrize("options", [[], FEDBUFF], ids=["rounds", "asynchronous"])
def test_messages_that_measured_over_fitting_at_the_end_are_not_gone_on_from(
    tmp_path: Path, options: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = [*QUARTER, "evaluate.fit=5", *options]
    undisturbed = run_tiny(tmp_path / "whole", *options, "rounds=6")
    with caplog.at_level(logging.WARNING, "fl_sim"):
        _, longer = extended(tmp_path / "part", *options, rounds=(3, 6))
    same(undisturbed, longer)
    assert "in its last round, 3, clients measured over-fitting (evaluate.fit)" in caplog.text
    assert "nothing to resume, starting at round 1" in caplog.text


@pytest.mark.parametrize("options", [[], FEDBUFF], ids=["rounds", "asynchronous"])
def test_messages_before_the_last_round_are_gone_on_from(tmp_path: Path, options: list[str]) -> None:
    options = [*QUARTER, "evaluate.fit=5", *options]
    undisturbed = run_tiny(tmp_path / "whole", *options, "rounds=6")
    with pytest.raises(Killed):
        run(tiny(tmp_path / "part", *options, "rounds=3"), KillAfter(2))
    seen = KillAfter(99)
    same(undisturbed, run(tiny(tmp_path / "part", *options, "rounds=6"), seen, resume=True))
    assert seen.seen == [3, 4, 5, 6]


def test_what_was_measured_when_it_was_due_is_gone_on_from(tmp_path: Path) -> None:
    options = (*QUARTER, "evaluate.fit=5")
    undisturbed = run_tiny(tmp_path / "whole", *options, "rounds=6")
    run_tiny(tmp_path / "part", *options, "rounds=4")
    seen = KillAfter(99)
    same(undisturbed, run(tiny(tmp_path / "part", *options, "rounds=6"), seen, resume=True))
    assert seen.seen == [5, 6]
