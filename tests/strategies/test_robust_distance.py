"""Krum, multi-Krum and the geometric median against brute force, over sparse updates."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import PRUNABLE, SHAPES, mask, params, state

from fl_sim.core.types import Update, UserError
from strategies.aggregation import coverage_mean, zero_fill
from strategies.robust_distance import Krum, geometric_median

TRAINED = ("conv.weight", "bn.weight")
SEEDS = st.lists(st.integers(0, 60), min_size=3, max_size=8, unique=True)


def update(seed: int) -> Update:
    return Update(params(seed), seed + 1, mask(seed) if seed % 3 else None)


def change(update: Update) -> np.ndarray:
    """The trained part of an update's change, 0 where it sent nothing."""
    old, parts = state().params, []
    for name in TRAINED:
        moved = (update.params[name] - old[name]).double().numpy()
        sent = update.mask[name].numpy() if update.mask is not None and name in PRUNABLE else np.ones(moved.shape)
        parts.append((moved * sent).ravel())
    return np.concatenate(parts)


def ranked(updates: list[Update], bad: int) -> list[int]:
    points = [change(each) for each in updates]
    scores = []
    for i, point in enumerate(points):
        others = sorted(float(((point - other) ** 2).sum()) for j, other in enumerate(points) if j != i)
        scores.append(sum(others[: max(1, len(points) - bad - 2)]))
    return sorted(range(len(points)), key=scores.__getitem__)


@given(SEEDS, st.sampled_from([0.0, 0.2, 0.34]))
@settings(deadline=None)
def test_krum_keeps_the_updates_that_brute_force_keeps(seeds: list[int], share: float) -> None:
    updates = [update(seed) for seed in seeds]
    bad = int(share * len(updates) + 1e-9)
    order = ranked(updates, bad)
    for rule, count in ((Krum(share), 1), (Krum(share, many=True), len(updates) - bad)):
        got = rule(state(), updates)
        wanted = coverage_mean(state(), [updates[i] for i in sorted(order[:count])])
        assert all(torch.equal(got[name], wanted[name]) for name in SHAPES)


@given(SEEDS)
@settings(deadline=None)
def test_no_point_is_closer_to_all_than_the_geometric_median(seeds: list[int]) -> None:
    updates = [update(seed) for seed in seeds]
    got = geometric_median(state(), updates)
    found = change(Update({**state().params, **got}, 1))
    points = [change(each) for each in updates]

    def cost(at: np.ndarray) -> float:
        return float(sum(np.linalg.norm(at - point) for point in points))

    rng = np.random.default_rng(len(seeds))
    around = [found + scale * rng.normal(size=found.shape) for scale in (1e-3, 1e-2, 0.1, 1) for _ in range(4)]
    assert cost(found) <= min(map(cost, [*points, *around, np.mean(points, axis=0)])) * (1 + 1e-4)


def test_equal_updates_are_their_own_median() -> None:
    updates = [replace(update(3), num_examples=n) for n in (1, 5, 9)]
    for rule in (geometric_median, Krum(0.0), Krum(0.0, many=True)):
        got, wanted = rule(state(), updates), zero_fill(state(), updates[:1])
        assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in SHAPES)


@pytest.mark.parametrize("rule", [Krum(0.3), Krum(0.3, many=True), geometric_median])
@pytest.mark.parametrize("evil", [1e4, -1e8])
def test_three_of_ten_cannot_bend_it(rule, evil: float) -> None:
    honest = [Update({n: v * 0.01 for n, v in params(seed).items()}, 10) for seed in range(7)]
    bad = [Update({n: torch.full_like(v, evil) for n, v in params(0).items()}, 10**6) for _ in range(3)]
    bad = [
        replace(b, params={**b.params, "bn.running_mean": torch.zeros(3), "bn.running_var": torch.ones(3)}) for b in bad
    ]
    got = rule(state(), [*honest[:3], *bad, *honest[3:]])
    assert all(float(got[name].abs().max()) < 5 for name in TRAINED)


def test_no_update_and_one() -> None:
    assert all(torch.equal(v, state().params[n]) for n, v in geometric_median(state(), []).items())
    one = update(4)
    assert torch.equal(Krum(0.2)(state(), [one])["bn.weight"], one.params["bn.weight"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["strategy.byzantine=0.5"], "strategy.byzantine = 0.5: must be at least 0 and below 0.5"),
        (["strategy.byzantine=0.25"], "only where 2 x 1 + 2 < 4"),
        (["strategy.aggregate=krumm"], "did you mean 'krum'"),
    ],
)
def test_what_krum_cannot_withstand_is_said_before_round_1(tmp_path: Path, keys: list[str], said: str) -> None:
    experiment = tiny(tmp_path, "strategy.aggregate=krum", *keys)
    with pytest.raises(UserError) as error:
        experiment.strategy.build({"cohort_size": 4})
    assert said in str(error.value)


@pytest.mark.parametrize(("arrived", "said"), [(5, ""), (3, ""), (2, "0 bad of the 2 updates that arrived only where")])
def test_a_round_in_which_too_few_arrive_for_krum_is_said(
    arrived: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        Krum(0.2)(state(), [update(seed) for seed in range(arrived)])
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


def test_krum_counts_the_clients_of_each_model_of_several_capacities(tmp_path: Path) -> None:
    krum = ("cohort.size=4", "strategy.aggregate=krum", "rounds=1")
    assert run_tiny(tmp_path / "one", *krum).summary["rounds"] == 1
    two = "capacities=[{name='cnn_bn', width=0.25, share=0.5}]"
    with pytest.raises(UserError, match=r"withstands 0 bad of 2 clients .* only where 2 x 0 \+ 2 < 2"):
        run_tiny(tmp_path / "two", *krum, two)
