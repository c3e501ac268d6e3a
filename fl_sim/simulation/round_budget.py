"""Byte budget of a round (`wire.budget`): the coding of each direction, and what is said and refused before round 1."""

from __future__ import annotations

import logging

import torch

from fl_sim.codecs import VALUES
from fl_sim.codecs.integer_coding import Largest, Signs
from fl_sim.communication.byte_budget import ByteBudget, Split
from fl_sim.communication.exchange import Exchange
from fl_sim.config.experiment import Experiment
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import Params, UserError
from fl_sim.runtime.budget_coding import BudgetCoding
from fl_sim.sparsity.bit_allocation import TYPES

log = logging.getLogger("fl_sim")
UNBIASED = tuple(name for name in TYPES if not isinstance(VALUES[name], Signs | Largest))
"""Offered to uploads without error feedback, which would lose what the other types leave out."""


def split_of(experiment: Experiment, budget: ByteBudget) -> Split:
    """What each payload of a round may have: tasks go to clients that train and to those that evaluate."""
    cohort = experiment.cohort.size
    return budget.split(cohort + experiment.evaluate.clients, cohort)


def budget_codings(experiment: Experiment, budget: ByteBudget) -> tuple[BudgetCoding, BudgetCoding]:
    """The encoding of uplink and downlink."""
    wire, split = experiment.wire, split_of(experiment, budget)
    up, down = wire.uplink, wire.downlink
    offered = TYPES if wire.error_feedback else UNBIASED
    return (
        BudgetCoding(content=up.content, masks=up.masks, limit=split.up, types=offered, way="uplink"),
        BudgetCoding(content=down.content, masks=down.masks, limit=split.down, types=TYPES, way="downlink"),
    )


def _roomy(least: int) -> int:
    """Bytes of a smallest payload, with what it grows by from round to round."""
    return least + least // 20 + 64


def require_budget(
    experiment: Experiment, exchange: Exchange, initial: Params, start: Params, *, prunes: bool, sends_all: bool
) -> None:
    """Say how a byte budget is split, and check it on the first model.

    Args:
        experiment: with a budget, and one model.
        exchange: what travels.
        initial: the seeded model.
        start: the first global parameters.
        prunes: whether the strategy decides a mask, so that nobody knows the size of a task yet.
        sends_all: whether clients send all weights, so that the size of an upload is known.

    Raises:
        UserError: the budget is too small, or what travels on top of payloads has no bound.
    """
    budget = experiment.wire.budget
    assert budget is not None
    up, down = exchange.uplink, exchange.downlink
    assert isinstance(up, BudgetCoding)
    assert isinstance(down, BudgetCoding)
    if exchange.extra.up or exchange.extra.down:
        raise UserError("wire.budget: not with extra tensors of a method, which are payloads of their own")
    if exchange.base is not None:
        raise UserError(
            "wire.budget: not with frozen or personal entries of model.weights, which travel at a first contact"
        )
    split, schema, first = split_of(experiment, budget), exchange.schema, exchange.schema.flat(start)
    moved = schema.view(first + 0.01 * torch.randn(first.shape, generator=generator(0, Purpose.ENCODING)))
    # As after some training, in both directions: constant statistics and biases of a new model take next to nothing.
    least_down = 0 if prunes else _roomy(down.least(moved, initial, schema=schema))
    least_up = _roomy(up.least(moved, start, schema=schema)) if sends_all else 0
    if split.down < least_down or split.up < least_up:
        leaves = (
            f"wire.budget.megabytes = {budget.megabytes:g}: leaves {split.down:,} bytes to each of {split.tasks} tasks and "
            f"{split.up:,} to each of {split.uploads} uploads"
        )
        if prunes:
            raise UserError(
                f"{leaves}, and the smallest of these has {least_up:,}; tasks of a strategy that prunes come on top"
            )
        best = split.best_share(least_down, least_up)
        raise UserError(
            f"{leaves}, and the smallest have {least_down:,} and {least_up:,}; smallest "
            f"budget: {split.least(least_down, least_up, budget.downlink):g}, or {split.least(least_down, least_up, best):g} with "
            f"wire.budget.downlink = {best:g}"
        )
    log.warning(
        "wire.budget: %g MB a round: %s bytes to each of %d tasks, %s to each of %d uploads",
        budget.megabytes,
        f"{split.down:,}",
        split.tasks,
        f"{split.up:,}",
        split.uploads,
    )
