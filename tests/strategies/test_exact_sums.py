"""Exact sums: whoever adds up which updates, in whatever order, in memory or in a file, the total is correctly rounded."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import SHAPES, mask, params, state

from fl_sim.core import large
from fl_sim.core.types import Update
from strategies import accumulators
from strategies.aggregation import EQUAL, EqualWeights, coverage_mean, mean, weights_of_sums, zero_fill
from strategies.exact_sums import ExactSum
from strategies.remote_sums import content_of, summed
from strategies.robust import ClipNorm
from strategies.server_step import Arrived
from strategies.sums import Summed, Sums

SCHEMA = state().schema
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def update(seed: int, *, sparse: bool) -> Update:
    """An update whose values lie many powers of two apart, so that additions round."""
    scale = 10.0 ** ((seed * 7) % 23 - 11)
    made = {name: value * scale for name, value in params(seed).items()}
    return Update(SCHEMA.view(SCHEMA.flat(made)), 1 + seed % 5, mask(seed) if sparse else None)


def elsewhere(updates: Sequence[Update]) -> Summed:
    """Updates as a worker sends their sum."""
    sums = Sums.zeros(SCHEMA, exact=True)
    for each in updates:
        sums.add(each)
    made = summed(content_of(sums, len(updates)), SCHEMA)
    assert made is not None
    return made


def totals(sums: Sums) -> dict[str, bytes]:
    """The rounded sums."""
    parts = {name: getattr(sums, name) for name in ("prunable", "others", "squares", "covered")}
    return {
        name: b"".join(part.tobytes() for _, part in total.totals())
        for name, total in parts.items()
        if total is not None
    }


def fsum(updates: Sequence[Update]) -> dict[str, bytes]:
    """The same by `math.fsum` of the products of each coordinate."""
    count, flat = SCHEMA.prunable_size, [SCHEMA.flat(each.params).double().numpy() for each in updates]
    weights = [float(each.num_examples) for each in updates]
    sent = [np.ones(count, bool) if u.mask is None else SCHEMA.flat_mask(u.mask).numpy() for u in updates]
    means = Sums.zeros(SCHEMA).means.numpy()

    def each(rows: Sequence[np.ndarray]) -> bytes:
        return np.array([math.fsum(column) for column in zip(*rows, strict=True)]).tobytes()

    found = {
        "prunable": each([w * values[:count] * s for w, values, s in zip(weights, flat, sent, strict=True)]),
        "others": each([w * values[count:] for w, values in zip(weights, flat, strict=True)]),
        "squares": each([w * (values[means] * values[means]) for w, values in zip(weights, flat, strict=True)]),
    }
    if any(update.mask is not None for update in updates):
        found["covered"] = each([w * s.astype(np.float64) for w, s in zip(weights, sent, strict=True)])
    return found


@given(
    sparse=st.lists(st.booleans(), min_size=1, max_size=24),
    groups=st.integers(1, 5),
    remote=st.lists(st.booleans(), min_size=5, max_size=5),
    order=st.randoms(),
    in_file=st.booleans(),
)
@settings(deadline=None)
def test_whoever_adds_up_which_updates_the_total_is_correctly_rounded(
    sparse: list[bool], groups: int, remote: list[bool], order: random.Random, in_file: bool
) -> None:
    updates = [update(seed, sparse=each) for seed, each in enumerate(sparse)]
    expected, weight = fsum(updates), sum(each.num_examples for each in updates)
    order.shuffle(updates)
    parts = [updates[number::groups] for number in range(groups)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "LARGE_BYTES", 1 if in_file else 1 << 27)
        patch.setattr(accumulators, "PIECE", 4)
        found = Sums.zeros(SCHEMA, Path(folder), exact=True)
        for part, is_remote in zip(parts, remote, strict=False):
            if is_remote and part:
                found.merge(elsewhere(part).sums)
            else:
                for each in part:
                    found.add(each)
        assert totals(found) == expected
    assert found.weight == weight


@given(columns=st.lists(st.lists(FLOATS, min_size=6, max_size=6), min_size=1, max_size=9), order=st.randoms())
@settings(deadline=None)
def test_any_finite_values_add_up_to_the_rounded_sum_in_any_order(
    columns: list[list[float]], order: random.Random
) -> None:
    weighted = [(np.array(row, np.float32), float(3**place)) for place, row in enumerate(columns)]
    order.shuffle(weighted)
    total = ExactSum.zeros(6)
    for values, weight in weighted:
        total.add_scaled(values, weight)
    ((_, found),) = total.totals()
    rows = [(values.astype(np.float64) * weight).tolist() for values, weight in weighted]
    assert found.tolist() == [math.fsum(column) for column in zip(*rows, strict=True)]


def test_a_total_is_rounded_once_where_three_levels_are_not_zero() -> None:
    """2^53 + 1 lies half way: what is below decides, however far."""
    for tiny, expected in ((0.0, 2.0**53), (2.0**-149, 2.0**53 + 2), (-(2.0**-149), 2.0**53)):
        total = ExactSum.zeros(2)
        for value in (2.0**53, 1.0, 1.0 + 2.0**-23, -1.0 - 2.0**-23, tiny):
            total.add_scaled(np.full(2, value, np.float32), 1.0)
        ((_, found),) = total.totals()
        assert found.tolist() == [expected] * 2
        assert (len(total.levels) == 3) is (tiny != 0)


def test_squares_that_are_chosen_to_need_many_levels_are_added_up() -> None:
    """A thousand that level after level loses: each is half of the last bit of what the one above has come to."""
    powers, total = [284], ExactSum.zeros(1)
    for level in range(13):
        powers += [231 - 43 * level] * 1024
    for power in powers:
        weight = 30 * (power > 200) + power % 2
        value = 2.0 ** ((power - weight) // 2)
        total.add_squares(np.full(1, value, np.float32), np.zeros(1, np.int64), 2.0**weight)
    assert len(total.levels) == 14
    ((_, found),) = total.totals()
    assert found.tolist() == [math.fsum(2.0**power for power in powers)]


def test_a_mean_of_exact_sums_has_the_same_bits_whoever_adds_up() -> None:
    updates = [update(seed, sparse=seed % 3 == 0) for seed in range(40)]
    large_cohort = replace(state(), exact=True)
    for rule in (coverage_mean, zero_fill):
        alone, summed_up = (
            rule(large_cohort, updates),
            rule(large_cohort, [elsewhere(updates[::2]), elsewhere(updates[1::2])]),
        )
        mixed = rule(large_cohort, [*updates[30:], elsewhere(updates[:30])])
        assert all(torch.equal(alone[n], summed_up[n]) and torch.equal(alone[n], mixed[n]) for n in SHAPES)


def test_below_it_sums_are_plain_and_in_the_order_of_the_clients() -> None:
    """Beside 2**54 a one is lost."""
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    updates = [Update(SCHEMA.view(SCHEMA.flat(ones) * value), 1) for value in (2.0**54, 1.0, 1.0, 1.0, 1.0, -(2.0**54))]
    for exact, expected in ((False, 0.0), (True, 4 / 6)):
        found = coverage_mean(replace(state(), exact=exact), updates)
        assert float(found["conv.weight"][0, 0]) == float(torch.tensor(expected))


def test_a_level_that_is_zero_nearly_everywhere_travels_as_places_and_numbers() -> None:
    large_one = torch.zeros(SCHEMA.size)
    large_one[3] = 2.0**60
    sums = Sums.zeros(SCHEMA, exact=True)
    sums.add(Update(SCHEMA.view(torch.ones(SCHEMA.size)), 1))
    assert not [name for name in content_of(sums, 1)["sums"] if "." in name]
    sums.add(Update(SCHEMA.view(large_one), 1))
    content = content_of(sums, 2)
    assert sorted(name for name in content["sums"] if "." in name) == ["prunable.1", "prunable.1.places"]
    assert [array.shape for array in content["sums"].values()][:1] == [(SCHEMA.prunable_size,)]
    assert list(content["sums"]["prunable.1"].shape) == [1]
    made = summed(content, SCHEMA)
    assert made is not None
    assert made.clients == 2
    assert [level.part(slice(0, 6)).tolist() for level in made.sums.prunable.levels] == [  # type: ignore[union-attr]
        [1.0, 1.0, 1.0, 2.0**60, 1.0, 1.0],
        [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    ]


def test_the_sums_stay_with_an_update_that_a_rule_changes() -> None:
    part = elsewhere([update(1, sparse=False)])
    assert replace(part, num_examples=1).sums is part.sums
    assert EqualWeights(zero_fill)(replace(state(), exact=True), [part]).keys() == SHAPES.keys()


def test_sums_count_for_all_their_clients() -> None:
    arrived = Arrived()
    updates = [update(seed, sparse=False) for seed in range(3)]
    arrived.add(elsewhere(updates))
    arrived.add(updates[0])
    assert arrived.clients == 4


def test_which_rules_need_sums_alone() -> None:
    assert weights_of_sums(coverage_mean) == weights_of_sums(zero_fill) == "examples"
    assert weights_of_sums(EqualWeights(zero_fill)) == "equal"
    assert weights_of_sums(mean) is None, "settled before a run takes it"
    assert weights_of_sums(EQUAL) is None
    assert weights_of_sums(ClipNorm(1.0)) is None
    assert weights_of_sums(lambda state, updates: state.params) is None


def test_a_content_without_sums_is_none() -> None:
    content = content_of(Sums.zeros(SCHEMA, exact=True), 0)
    assert summed(content, SCHEMA) is not None
    del content["sums"]
    assert summed(content, SCHEMA) is None
