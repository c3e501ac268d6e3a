"""Who takes part: drawn from the seed for each round, purpose and size, whatever was asked before; replies are not kept."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
from federation import run_tiny
from flwr.app import Message
from flwr.clientapp import ClientApp

from fl_sim.core.seeding import Purpose
from fl_sim.core.types import Update
from fl_sim.runtime.grids.inline import InlineGrid
from strategies.cohorts import Cohorts
from strategies.uplink_receiver import UplinkReceiver


def test_a_cohort_depends_on_round_purpose_and_size_and_not_on_what_was_asked_before() -> None:
    grid, asked = InlineGrid(ClientApp(), 50), Cohorts(seed=3)
    questions = [
        (1, Purpose.COHORT, 10),
        (2, Purpose.COHORT, 10),
        (2, Purpose.EVALUATION, 10),
        (2, Purpose.EVALUATION, 7),
    ]
    answers = [asked.cohort(grid, *question) for question in questions]
    assert len({tuple(answer) for answer in answers}) == len(questions)
    for question, answer in zip(questions, answers, strict=True):
        assert answer == Cohorts(seed=3).cohort(grid, *question)
        assert asked.cohort(grid, *question) == asked.cohort(grid, *question) == answer
        assert answer == sorted(answer)
        assert len(answer) == question[2]
        assert all(grid.partitions[node] == partition for partition, node in answer)


def test_a_reply_is_given_back_before_the_next_client_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one reply, whatever the cohort; the next one is encoded where the last one was."""
    kept: list[weakref.ref[object]] = []
    run_one, read = InlineGrid._run_one, UplinkReceiver._update

    def run(grid: InlineGrid, message: Message) -> Message:
        assert all(thing() is None for thing in kept)
        reply = run_one(grid, message)
        kept.append(weakref.ref(reply))
        return reply

    def update(receiver: UplinkReceiver, *args: Any) -> Update:
        made = read(receiver, *args)
        kept.append(weakref.ref(made.params))
        return made

    monkeypatch.setattr(InlineGrid, "_run_one", run)
    monkeypatch.setattr(UplinkReceiver, "_update", update)
    run_tiny(tmp_path, "model.name=mlp", "rounds=1")
    assert len(kept) == 8
