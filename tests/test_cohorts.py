"""Who takes part: drawn from the seed for each round, purpose and size, whatever was asked before."""

from __future__ import annotations

from flwr.clientapp import ClientApp

from fl_sim.runtime.inline import InlineGrid
from fl_sim.seeding import Purpose
from strategies.cohorts import Cohorts


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
