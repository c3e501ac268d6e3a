"""Scores, allocations, masks, schedules, rules: laws and brute-force oracles."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.core.types import Scores, UserError
from fl_sim.sparsity import (
    Cubic,
    Iterative,
    OneShot,
    PruneTo,
    density,
    erk,
    global_topk,
    intersect,
    lamp,
    magnitude,
    prune_and_grow,
    saliency,
    topk_mask,
    uniform,
)

ALLOCATIONS = [global_topk, uniform, erk, lamp]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def scores(draw: st.DrawFn, *, most: int = 4, levels: int = 5) -> Scores:
    """Small tensors with many ties."""
    shapes = draw(st.lists(st.sampled_from([(3,), (2, 2), (1,), (4, 2), (5,)]), min_size=1, max_size=most))
    source = rng(draw(st.integers(0, 10_000)))
    return {f"w{i}": torch.randint(0, levels, s, generator=source).float() for i, s in enumerate(shapes)}


def total(some: Scores) -> int:
    return sum(s.numel() for s in some.values())


@given(some=scores(), share=st.floats(0, 1))
@settings(deadline=None, max_examples=examples(200))
def test_counts_sum_exactly_and_masks_have_them(some: Scores, share: float) -> None:
    for allocate in ALLOCATIONS:
        keep = allocate(some, share)
        assert sum(keep.values()) == round(share * total(some))
        mask = topk_mask(some, keep)
        assert {n: int(m.sum()) for n, m in mask.items()} == keep


@given(some=scores(), share=st.floats(0, 1))
@settings(deadline=None, max_examples=examples(200))
def test_topk_masks_equal_a_stable_sort(some: Scores, share: float) -> None:
    keep = uniform(some, share)
    for name, mask in topk_mask(some, keep).items():
        ranked = [i for _, i in sorted((-value, i) for i, value in enumerate(some[name].reshape(-1).tolist()))]
        expected = torch.zeros(mask.numel(), dtype=torch.bool)
        expected[ranked[: keep[name]]] = True
        assert torch.equal(mask.reshape(-1), expected)


@given(some=scores(), share=st.floats(0, 1))
@settings(deadline=None, max_examples=examples(200))
def test_global_ranking_equals_a_stable_sort_of_everything(some: Scores, share: float) -> None:
    entries = [
        (-value, order, i) for order, s in enumerate(some.values()) for i, value in enumerate(s.reshape(-1).tolist())
    ]
    chosen = sorted(entries)[: round(share * total(some))]
    names = list(some)
    expected = dict.fromkeys(names, 0)
    for _, order, _ in chosen:
        expected[names[order]] += 1
    assert global_topk(some, share) == expected


@given(some=scores(most=3), share=st.floats(0, 1), least=st.integers(0, 3))
@settings(deadline=None, max_examples=examples(200))
def test_the_minimum_threshold_is_the_constrained_optimum(some: Scores, share: float, least: int) -> None:
    budget = round(share * total(some))
    floors = [min(least, s.numel()) for s in some.values()]
    if budget < sum(floors):
        with pytest.raises(UserError, match="largest feasible sparsity"):
            global_topk(some, share, min_keep=least)
        return
    best = max(
        sum(
            float(s.reshape(-1).sort(descending=True).values[:k].sum())
            for s, k in zip(some.values(), counts, strict=True)
        )
        for counts in itertools.product(*(range(f, s.numel() + 1) for f, s in zip(floors, some.values(), strict=True)))
        if sum(counts) == budget
    )
    keep = global_topk(some, share, min_keep=least)
    assert all(keep[n] >= f for n, f in zip(some, floors, strict=True))
    assert float(sum(some[n].reshape(-1).sort(descending=True).values[: keep[n]].sum() for n in some)) == pytest.approx(
        best
    )


@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_min_keep_prevents_layer_collapse(allocate) -> None:
    some = {"large": torch.rand(1000, generator=rng()) + 10, "small": torch.rand(100, generator=rng())}
    keep = allocate(some, 0.02, min_keep=5)
    assert keep["small"] >= 5
    assert sum(keep.values()) == 22
    if allocate is global_topk:
        assert global_topk(some, 0.02)["small"] == 0


@given(power=st.integers(-20, 20))
@settings(deadline=None)
def test_scale_of_all_scores_does_not_matter(power: int) -> None:
    some = {"a": torch.rand(50, generator=rng()), "b": torch.rand(30, 2, generator=rng(1))}
    scaled = {n: s * 2.0**power for n, s in some.items()}
    for allocate in ALLOCATIONS:
        assert allocate(some, 0.3) == allocate(scaled, 0.3)


def test_large_selections_equal_a_sort() -> None:
    values = torch.randn(300_001, generator=rng()).abs()
    values[::7] = 0.25
    for k in (1, 1000, 100_000, 299_999):
        mask = topk_mask({"w": values}, {"w": k})["w"]
        order = torch.sort(values, descending=True, stable=True).indices[:k]
        expected = torch.zeros_like(mask)
        expected[order] = True
        assert torch.equal(mask, expected)


def test_erk_and_lamp_follow_their_formulas() -> None:
    some = {"conv": torch.rand(8, 4, 3, 3, generator=rng()), "fc": torch.rand(10, 16, generator=rng())}
    keep = erk(some, 0.2)
    assert keep["conv"] / keep["fc"] == pytest.approx((8 + 4 + 3 + 3) / (10 + 16), rel=0.05)
    small = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 10.0])}
    # LAMP: a = [1/14, 4/13, 1], b = [1/101, 1]
    assert lamp(small, 0.6) == {"a": 2, "b": 1}
    assert lamp(small, 0.8) == {"a": 3, "b": 1}


def test_densities_outside_are_refused() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        global_topk({"a": torch.ones(3)}, 1.5)


@given(share=st.floats(0.1, 0.9), fraction=st.floats(0, 1), seed=st.integers(0, 100))
@settings(deadline=None)
def test_prune_and_grow_keeps_the_density_and_exchanges_the_right_ones(
    share: float, fraction: float, seed: int
) -> None:
    drop, grow = {"w": torch.rand(6, 10, generator=rng(seed))}, {"w": torch.rand(6, 10, generator=rng(seed + 1))}
    mask = topk_mask({"w": torch.rand(6, 10, generator=rng(seed + 2))}, {"w": round(60 * share)})
    new = prune_and_grow(mask, drop, grow, fraction)["w"]
    old = mask["w"]
    assert int(new.sum()) == int(old.sum())
    dropped, grown = old & ~new, new & ~old
    assert int(dropped.sum()) == min(int(fraction * int(old.sum())), 60 - int(old.sum()))
    if dropped.any():
        assert float(drop["w"][dropped].max()) <= float(drop["w"][old & new].min()) if (old & new).any() else True
        rest = ~old & ~new
        assert not rest.any() or float(grow["w"][grown].min()) >= float(grow["w"][rest].max())


def test_schedules() -> None:
    assert [OneShot(3, 0.1)(r) for r in (1, 2, 3, 9)] == [1.0, 1.0, 0.1, 0.1]
    cubic = Cubic(2, 10, 0.1)
    values = [cubic(r) for r in range(13)]
    assert values[:3] == [1.0, 1.0, 1.0]
    assert values == sorted(values, reverse=True)
    assert values[6] == pytest.approx(1 - 0.9 * (1 - 0.5**3))
    assert values[10:] == [pytest.approx(0.1)] * 3
    assert [Iterative(2, 2, 0.5, 0.2)(r) for r in (1, 2, 3, 4, 6)] == [1.0, 0.5, 0.5, 0.25, 0.2]


def test_pruning_is_nested_even_when_alive_weights_are_zero() -> None:
    params = {"a": torch.randn(20, 10, generator=rng()), "b": torch.randn(50, generator=rng(1))}
    rule, mask = PruneTo(Cubic(0, 8, 0.05)), None
    for number in range(1, 11):
        new = rule(number, mask, params, None)
        if mask is not None:
            assert density(intersect(mask, new)) == density(new)
        assert density(new) == pytest.approx(Cubic(0, 8, 0.05)(number), abs=0.003)
        params = {n: torch.where(new[n], torch.zeros(()) if number == 5 else p, 0.0) for n, p in params.items()}
        mask = new


def test_one_shot_keeps_the_largest_and_then_keeps_its_mask() -> None:
    params = {"a": torch.randn(20, 10, generator=rng())}
    rule = PruneTo(OneShot(2, 0.1))
    assert rule(1, None, params, None) is None
    mask = rule(2, None, params, None)
    assert float(params["a"].abs()[mask["a"]].min()) >= float(params["a"].abs()[~mask["a"]].max())
    assert rule(3, mask, {"a": torch.randn(20, 10, generator=rng(9))}, None) is mask


def test_scores() -> None:
    weights, grads = {"w": torch.tensor([-2.0, 3.0])}, {"w": torch.tensor([4.0, -1.0])}
    assert magnitude(weights)["w"].tolist() == [2, 3]
    assert saliency(weights, grads)["w"].tolist() == [8, 3]
