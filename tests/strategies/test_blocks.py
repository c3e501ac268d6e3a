"""Sums in blocks: the order of additions is that of the blocks, whoever adds up one of them, in memory or in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from updates import SHAPES, mask, params, state

from fl_sim.core import large
from fl_sim.core.types import Update
from strategies.aggregation import EQUAL, EqualWeights, coverage_mean, mean, weights_of_sums, zero_fill
from strategies.blocks import BlockSums, Placed
from strategies.remote_sums import content_of, summed
from strategies.robust import ClipNorm
from strategies.server_step import Arrived
from strategies.sums import Sums

SCHEMA = state().schema


def update(seed: int, *, sparse: bool) -> Update:
    """An update whose values lie many powers of two apart, so that additions round."""
    scale = 10.0 ** ((seed * 7) % 23 - 11)
    made = {name: value * scale for name, value in params(seed).items()}
    return Update(SCHEMA.view(SCHEMA.flat(made)), 1 + seed % 5, mask(seed) if sparse else None)


def placed(made: Update, block: int) -> Placed:
    """An update in a block."""
    return Placed(made.params, made.num_examples, made.mask, made.metrics, made.extra, block)


def elsewhere(block: Sequence[Placed]) -> Update:
    """A block as a worker sends it."""
    sums = Sums.zeros(SCHEMA)
    for each in block:
        sums.add(each)
    made = summed(content_of(sums, len(block)), SCHEMA, block[0].block)
    assert made is not None
    return made


@given(
    kinds=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=12),
    in_file=st.booleans(),
)
def test_whoever_adds_up_a_block_the_bits_are_the_same(kinds: list[tuple[int, bool, bool]], in_file: bool) -> None:
    """`kinds`: of each block the number of its updates that count, whether they are sparse, and whether a worker adds them up."""
    blocks: list[list[Placed]] = []
    seed = 0
    for number, (count, sparse, _) in enumerate(kinds):
        blocks.append([placed(update(seed := seed + 1, sparse=sparse), number) for _ in range(count)])
    expected = Sums.zeros(SCHEMA)
    for block in blocks:
        alone = Sums.zeros(SCHEMA)
        for each in block:
            alone.add(each)
        expected.merge(alone)
    one_by_one = Sums.zeros(SCHEMA)  # weights are whole numbers, whose sums do not round
    for each in (each for block in blocks for each in block):
        one_by_one.add(each)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "LARGE_BYTES", 1 if in_file else 1 << 27)
        found = BlockSums(SCHEMA, Path(folder))
        for block, (_, _, is_remote) in zip(blocks, kinds, strict=True):
            for each in [elsewhere(block)] if is_remote and block else block:
                found.add(each)
        total = found.total()
        for name in ("prunable", "others", "covered"):
            ours, theirs = getattr(total, name), getattr(one_by_one if name == "covered" else expected, name)
            assert (ours is None) == (theirs is None), name
            for (place, part), (_, wanted) in zip(ours.pieces(), theirs.pieces(), strict=True) if ours else ():
                assert part.tobytes() == wanted[place].tobytes(), name
    assert total.weight == expected.weight == sum(each.num_examples for block in blocks for each in block)
    assert torch.equal(total.squares, expected.squares)


def test_additions_are_those_of_the_blocks() -> None:
    """Beside 2**54 a one is lost, and four of them together are not."""
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    values = [2.0**54, 1.0, 1.0, 1.0, 1.0]
    updates = [Update(SCHEMA.view(SCHEMA.flat(ones) * value), 1) for value in values]

    def added(blocks: Sequence[int]) -> float:
        sums = BlockSums(SCHEMA)
        for each, block in zip(updates, blocks, strict=True):
            sums.add(placed(each, block))
        return float(next(sums.total().prunable.pieces())[1][0])

    assert added([0, 0, 0, 0, 0]) == 2.0**54
    assert added([0, 1, 1, 1, 1]) == 2.0**54 + 4


def test_the_block_stays_with_an_update_that_a_rule_changes() -> None:
    assert replace(placed(update(1, sparse=False), 7), num_examples=1).block == 7
    first = placed(update(1, sparse=False), 3)
    assert EqualWeights(zero_fill)(state(), [first]).keys() == SHAPES.keys()


def test_sums_count_for_all_their_clients() -> None:
    arrived = Arrived()
    block = [placed(update(seed, sparse=False), 0) for seed in range(3)]
    arrived.add(elsewhere(block))
    arrived.add(block[0])
    assert arrived.clients == 4


def test_which_rules_need_sums_alone() -> None:
    assert weights_of_sums(coverage_mean) == weights_of_sums(zero_fill) == "examples"
    assert weights_of_sums(EqualWeights(zero_fill)) == "equal"
    assert weights_of_sums(mean) is None, "settled before a run takes it"
    assert weights_of_sums(EQUAL) is None
    assert weights_of_sums(ClipNorm(1.0)) is None
    assert weights_of_sums(lambda state, updates: state.params) is None


def test_a_content_without_sums_is_none() -> None:
    assert summed(content_of(Sums.zeros(SCHEMA), 0), SCHEMA, 0) is not None
    content = content_of(Sums.zeros(SCHEMA), 0)
    del content["sums"]
    assert summed(content, SCHEMA, 0) is None
