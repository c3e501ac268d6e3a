"""Who takes part: drawn from the seed for each round, purpose and size, whatever was asked before; replies are not kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from federation import run_tiny
from flwr.app import Message
from flwr.clientapp import ClientApp
from grids import inline_is

from fl_sim.core.seeding import Purpose
from fl_sim.core.types import Params, Update
from fl_sim.runtime.grids.inline import InlineGrid
from strategies.aggregation import coverage_mean
from strategies.cohorts import Cohorts
from strategies.server_step import ServerState


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


kept: list[weakref.ref[object]] = []
"""Replies and decoded parameters since the run began."""


class Watched(InlineGrid):
    """Allows a client to train only when nothing of the client before it is held."""

    def stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        replies = super().stream(messages, timeout)
        while True:
            assert all(thing() is None for thing in kept)
            reply = next(replies, None)
            if reply is None:
                return
            kept.append(weakref.ref(reply))
            yield reply
            del reply


def watched(state: ServerState, updates: Iterable[Update]) -> Params:
    """`coverage_mean`, which notes the parameters that it folds."""

    def each() -> Iterator[Update]:
        for update in updates:
            kept.append(weakref.ref(update.params))
            yield update
            del update

    return coverage_mean(state, each())


def test_a_reply_is_given_back_before_the_next_client_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one reply, whatever the cohort; the next one is encoded where the last one was."""
    kept.clear()
    inline_is(monkeypatch, Watched)
    options = ["strategy.target=strategies.presets:fedavg", f'strategy.aggregate="{__name__}:watched"']
    run_tiny(tmp_path, "model.name=mlp", "rounds=1", *options)
    assert len(kept) == 6  # a reply and its parameters, of three clients; the trial of the rule left nothing
