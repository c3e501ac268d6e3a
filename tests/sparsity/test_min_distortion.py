"""The multiple-choice knapsack against exhaustive search, a textbook program and the Lagrangian bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.core.types import UserError
from fl_sim.sparsity import knapsack as program
from fl_sim.sparsity import min_distortion

Table = list[list[float]]
Rates = list[list[int]]


@st.composite
def instances(draw: st.DrawFn) -> tuple[Rates, Table, int]:
    """Small, ragged, with equal rates, equal distortions, and rates that do not fall with the level."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rates = [draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)) for n in lengths]
    value = st.integers(-3, 12).map(float) | st.floats(0, 1) | st.just(float("inf"))
    table = [draw(st.lists(value, min_size=n, max_size=n)) for n in lengths]
    return rates, table, draw(st.integers(0, 36))


def spent(rates: Rates, levels: list[int]) -> int:
    return sum(r[q] for r, q in zip(rates, levels, strict=True))


def value(table: Table, levels: list[int]) -> float:
    return sum(d[q] for d, q in zip(table, levels, strict=True))


def exhaustive(rates: Rates, table: Table, budget: int, minimum: list[int]) -> float:
    choices = itertools.product(*(range(low, len(r)) for low, r in zip(minimum, rates, strict=True)))
    return min((value(table, list(c)) for c in choices if spent(rates, list(c)) <= budget), default=float("inf"))


def check(rates: Rates, table: Table, budget: int, minimum: list[int], best: float) -> None:
    if best == float("inf"):
        with pytest.raises(ValueError, match=r"budget|finite"):
            min_distortion(rates, table, budget, minimum=minimum)
        return
    levels = min_distortion(rates, table, budget, minimum=minimum)
    assert all(q >= low for q, low in zip(levels, minimum, strict=True))
    assert spent(rates, levels) <= budget
    assert value(table, levels) == pytest.approx(best, abs=1e-9)


@given(instance=instances(), data=st.data())
@settings(deadline=None, max_examples=examples(500))
def test_it_is_exhaustive_search(instance: tuple[Rates, Table, int], data: st.DataObject) -> None:
    rates, table, budget = instance
    minimum = [data.draw(st.integers(0, len(r) - 1)) for r in rates]
    check(rates, table, budget, minimum, exhaustive(rates, table, budget, minimum))


@given(instance=instances())
@settings(deadline=None, max_examples=examples(300))
def test_table_merges_give_the_same(instance: tuple[Rates, Table, int]) -> None:
    """Every merge through the table, which otherwise only large instances use."""
    rates, table, budget = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_sorted_merge", through_table)
        check(rates, table, budget, [0] * len(rates), exhaustive(rates, table, budget, [0] * len(rates)))


def through_table(states: program.States, layer: program.Layer, room: int) -> program.States:
    least = int(states.rates[0] + layer.rates[0])
    return program._table_merge(states, layer, least, room - least + 1)


def curves(seed: int, *, layers: int, levels: int, size: int) -> tuple[Rates, Table]:
    """Monotone, not convex; what pruning to q/(levels - 1) keeps."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(size // 10, size, layers)
    rates = [[int(n) - q * int(n) // (levels - 1) for q in range(levels)] for n in sizes]
    return rates, [np.cumsum(rng.exponential(1.0, levels) ** 3).tolist() for _ in sizes]


def textbook(rates: Rates, table: Table, budget: int) -> float:
    best = np.zeros(budget + 1)
    for rate, distortion in zip(rates, table, strict=True):
        new = np.full(budget + 1, np.inf)
        for r, d in zip(rate, distortion, strict=True):
            if r <= budget:
                new[r:] = np.minimum(new[r:], best[: budget + 1 - r] + d)
        best = new
    return float(best[-1])


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_textbook_program(seed: int) -> None:
    rates, table = curves(seed, layers=12, levels=21, size=400)
    budget = int(sum(r[0] for r in rates) * (0.03 + 0.08 * seed))
    levels = min_distortion(rates, table, budget)
    assert spent(rates, levels) <= budget
    assert value(table, levels) == pytest.approx(textbook(rates, table, budget), rel=1e-12)


def test_more_budget_is_never_worse() -> None:
    rates, table = curves(1, layers=8, levels=11, size=200)
    values = [value(table, min_distortion(rates, table, budget)) for budget in range(0, 1400, 7)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


def test_nothing_beats_the_lagrangian_bound_and_little_is_lost_to_it() -> None:
    """ResNet-32's size: 34 layers, 101 levels. The bound is weak duality at the best of a grid of prices."""
    rates, table = curves(2, layers=34, levels=101, size=30_000)
    for share in (0.8, 0.3, 0.05):
        budget = int(share * sum(r[0] for r in rates))
        got = value(table, min_distortion(rates, table, budget))
        bound = max(
            sum(float((np.asarray(d) + price * np.asarray(r)).min()) for r, d in zip(rates, table, strict=True))
            - price * budget
            for price in np.geomspace(1e-6, 1e2, 400)
        )
        assert bound <= got * (1 + 1e-12)
        assert got <= bound * 1.1


def test_equal_distortions_take_the_least_rate() -> None:
    assert min_distortion([[9, 5, 7], [4, 3]], [[1.0, 1.0, 1.0], [0.0, 2.0]], 100) == [1, 0]
    assert min_distortion([], [], 0) == []


def test_rates_that_defeat_the_bound() -> None:
    """Distortion proportional to the rate: every level is on the bound, and what is left is a subset-sum problem."""
    rng = np.random.default_rng(0)
    rates = [[0, *sorted(rng.integers(2_000, 9_000, 12).tolist())] for _ in range(10)]
    table = [[-0.001 * r for r in rate] for rate in rates]
    budget = 31_415
    levels = min_distortion(rates, table, budget)
    assert value(table, levels) == pytest.approx(textbook(rates, table, budget), abs=1e-9)


@pytest.mark.parametrize("unit", [1, 3, 50, 10_000])
def test_units_hold_the_budget_and_lose_at_most_what_is_said(unit: int) -> None:
    for seed in range(8):
        rates, table = curves(seed, layers=9, levels=15, size=500)
        budget = int(0.3 * sum(r[0] for r in rates))
        levels = min_distortion(rates, table, budget, unit=unit)
        assert spent(rates, levels) <= budget
        smaller = budget - (len(rates) + 1) * (unit - 1)
        if smaller >= 0:
            assert value(table, levels) <= textbook(rates, table, smaller) + 1e-9


def test_too_many_states_fall_back_to_units(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, table = curves(3, layers=9, levels=15, size=500)
    budget = int(0.3 * sum(r[0] for r in rates))
    best = textbook(rates, table, budget)
    monkeypatch.setattr(program, "STATES", 1)
    monkeypatch.setattr(program, "UNITS", budget // 2)
    levels = min_distortion(rates, table, budget)
    assert spent(rates, levels) <= budget
    assert best <= value(table, levels) <= textbook(rates, table, budget - 2 * (len(rates) + 1)) + 1e-9
    assert value(table, min_distortion(rates, table, budget, unit=1)) == pytest.approx(best)


def test_numbers_beyond_32_bits() -> None:
    rates = [[1 << 40, 3, 0], [1 << 39, 1, 0]]
    assert min_distortion(rates, [[0.0, 8.0, 9.0], [0.0, 5.0, 9.0]], (1 << 40) + 1) == [0, 1]
    assert min_distortion(rates, [[0.0, 1.0, 9.0], [0.0, 5.0, 9.0]], (1 << 39) + 3) == [1, 0]


@pytest.mark.parametrize(
    ("rates", "table", "budget", "words"),
    [
        ([[5, 4]], [[0.0, 1.0]], 3, "budget = 3.*sum to 4"),
        ([[1]], [[0.0], [1.0]], 3, "layers"),
        ([[1, 2]], [[0.0]], 3, "layer 0"),
        ([[-1]], [[0.0]], 3, "non-negative"),
        ([[1.5]], [[0.0]], 3, "integers"),
        ([[1]], [[float("nan")]], 3, "NaN"),
        ([[1]], [[float("inf")]], 3, "finite"),
        ([[]], [[]], 3, "no level"),
    ],
)
def test_what_is_no_table_is_refused(rates: Rates, table: Table, budget: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        min_distortion(rates, table, budget)
    with pytest.raises(UserError, match="unit"):
        min_distortion([[1]], [[0.0]], 3, unit=0)
