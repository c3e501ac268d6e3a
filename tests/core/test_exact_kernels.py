"""Sums that no addition rounds: both forms have the same bits, and their levels are the sum in real arithmetic."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_sim.core import kernels
from fl_sim.core.kernels import exact
from fl_sim.core.kernels import exact_reference as reference

FORMS = pytest.mark.parametrize("form", [exact, reference], ids=["chosen", "NumPy"])
SIZES = st.sampled_from([0, 1, 7, reference.CHUNK - 1, reference.CHUNK, reference.CHUNK + 1, 3 * reference.CHUNK + 5])
LEVELS = 13


def drawn(seed: int, size: int, count: int) -> list[np.ndarray]:
    """Updates whose values have all magnitudes of a float32, some next to each other, and some the negative of others."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**32, (count, size), dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(0.1))
    near = rng.random((count, size)) < 0.5
    values = np.where(near, rng.normal(size=(count, size)).astype(np.float32), values)
    return [*values, *(-values[: count // 2] * (rng.random(size) < 0.5).astype(np.float32))]


def added(form, numbers: list[tuple[np.ndarray, float]], size: int) -> list[np.ndarray]:
    """The levels of weighted sums, as many as are needed."""
    levels = [np.zeros(size)]
    for values, weight in numbers:
        done = form.add_scaled_exactly(levels, values, weight, 0)
        while done < size:
            levels.append(np.zeros(size))
            done = form.add_scaled_exactly(levels, values, weight, done)
    return levels


def test_the_loops_are_compiled_where_the_others_are() -> None:
    assert exact.FORM == kernels.FORM


def test_without_the_compiled_form_numpy_does_the_same() -> None:
    program = """
import sys
sys.modules["fl_sim.core.kernels._exact"] = None
from fl_sim.core.kernels import exact
assert exact.FORM == "NumPy" and exact.add_exactly is exact.reference.add_exactly
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@FORMS
@given(seed=st.integers(0, 2**32 - 1), size=SIZES, count=st.integers(1, 12), order=st.randoms())
@settings(deadline=None, max_examples=50)
def test_levels_are_the_sum_in_real_arithmetic_in_any_order(
    form, seed: int, size: int, count: int, order: random.Random
) -> None:
    updates = drawn(seed, size, count)
    weights = [float(w) for w in np.random.default_rng(seed).integers(1, 2**31, len(updates))]
    numbers = list(zip(updates, weights, strict=True))
    order.shuffle(numbers)
    levels = added(form, numbers, size)
    assert len(levels) <= LEVELS
    for place in range(0, size, 101):
        real = sum((Fraction(float(values[place]) * weight) for values, weight in numbers), Fraction(0))
        assert sum((Fraction(float(level[place])) for level in levels), Fraction(0)) == real


@given(seed=st.integers(0, 2**32 - 1), size=SIZES, count=st.integers(1, 8), start=st.integers(0, 2000))
@settings(deadline=None, max_examples=50)
def test_both_forms_have_the_same_bits_and_stop_at_the_same_places(
    seed: int, size: int, count: int, start: int
) -> None:
    start, rng = min(start, size), np.random.default_rng(seed)
    both = [[np.zeros(size) for _ in range(3)] for _ in range(2)]
    covered = [np.zeros(size) for _ in range(2)]
    for depth, values in enumerate(drawn(seed, size, count)):
        sent, weight, depth = rng.random(size) < 0.5, float(rng.integers(1, 2**31)), 1 + depth % 3
        numbers = weight * values.astype(np.float64) ** 2
        stops = [
            (
                form.add_scaled_exactly(levels[:depth], values, weight, start),
                form.add_sent_exactly(levels[:depth], counts, values, sent, weight, 0),
                form.add_exactly(levels[:depth], numbers, start),
            )
            for form, levels, counts in zip((exact, reference), both, covered, strict=True)
        ]
        assert stops[0] == stops[1]
    for mine, theirs in zip([*both[0], covered[0]], [*both[1], covered[1]], strict=True):
        assert mine.tobytes() == theirs.tobytes()


@FORMS
def test_where_a_level_is_missing_nothing_of_the_chunk_is_added(form) -> None:
    size, at = 3 * reference.CHUNK, reference.CHUNK + 3
    levels, covered = [np.zeros(size)], np.zeros(size)
    levels[0][at] = 2.0**60
    values, sent = np.ones(size, np.float32), np.ones(size, bool)
    assert form.add_sent_exactly(levels, covered, values, sent, 3.0, 0) == reference.CHUNK
    assert levels[0][: reference.CHUNK].tolist() == covered[: reference.CHUNK].tolist() == [3.0] * reference.CHUNK
    assert np.flatnonzero(levels[0][reference.CHUNK :]).tolist() == [3]
    assert not covered[reference.CHUNK :].any()
    levels.append(np.zeros(size))
    assert form.add_sent_exactly(levels, covered, values, sent, 3.0, reference.CHUNK) == size
    assert (levels[0][at], levels[1][at]) == (2.0**60, 3.0)
    assert covered.tolist() == [3.0] * size


@FORMS
def test_sums_that_are_not_finite_lose_nothing(form) -> None:
    """Updates are finite and their sums far from the largest float64; a rule of the user's own may still make others."""
    levels = [np.array([np.inf, np.inf, np.nan, 1.7e308, 1.0])]
    assert form.add_exactly(levels, np.array([1.0, -np.inf, 1.0, 1.7e308, np.nan]), 0) == 5
    assert np.isposinf(levels[0][[0, 3]]).all()
    assert np.isnan(levels[0][[1, 2, 4]]).all()


@FORMS
def test_the_extremes_of_float32_and_of_weights_add_up(form) -> None:
    info, most = np.finfo(np.float32), float(2**31 - 1)
    values = [info.max, info.smallest_subnormal, -info.max, info.tiny, 1.0, -1.0, info.max, info.smallest_subnormal]
    numbers = [(np.full(3, value, np.float32), most) for value in values]
    levels = added(form, numbers, 3)
    exactly = math.fsum(float(np.float32(value)) * most for value in values)
    assert [math.fsum(float(level[place]) for level in levels) for place in range(3)] == [exactly] * 3


@FORMS
@pytest.mark.parametrize("start", [-1, 9])
def test_a_start_outside_the_numbers_is_refused(form, start: int) -> None:
    with pytest.raises(IndexError):
        form.add_exactly([np.zeros(8)], np.ones(8), start)


@pytest.mark.skipif(exact.FORM != "compiled", reason="no C compiler here")
@pytest.mark.parametrize(
    "change",
    [
        {0: []},
        {0: [np.zeros(8)] * 30},
        {0: [np.zeros(8), np.zeros(7)]},
        {0: [np.zeros(8), np.zeros(8, np.float32)]},
        {0: [np.zeros(16)[::2]]},
        {0: [np.frombuffer(bytes(64))]},
        {0: 1},
        {1: np.zeros(7)},
        {1: np.frombuffer(bytes(64))},
        {2: np.zeros(8)},
        {2: np.zeros(9, np.float32)},
        {3: np.zeros(8, np.uint8)},
        {3: np.zeros(9, bool)},
        {4: "1"},
        {5: 1.5},
    ],
    ids=lambda change: "-".join(f"{at}:{type(value).__name__}" for at, value in change.items()),
)
def test_what_is_no_array_of_the_right_kind_and_length_is_refused(change: dict[int, object]) -> None:
    good = [[np.zeros(8)], np.zeros(8), np.zeros(8, np.float32), np.zeros(8, bool), 1.0, 0]
    bad = [change.get(i, value) for i, value in enumerate(good)]
    with pytest.raises((TypeError, ValueError, BufferError)):
        exact.add_sent_exactly(*bad)
    if change.keys() & {0, 2, 4, 5}:
        with pytest.raises((TypeError, ValueError, BufferError)):
            exact.add_scaled_exactly(bad[0], bad[2], bad[4], bad[5])
    if change.keys() & {0, 5}:
        with pytest.raises((TypeError, ValueError, BufferError)):
            exact.add_exactly(bad[0], np.zeros(8), bad[5])
    assert exact.add_sent_exactly(*good) == 8
