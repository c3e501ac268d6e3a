"""Schedules and mask rules: exact densities, nested masks, exchanges, composition."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch

from fl_sim.core.types import Grads, Mask, MaskRule, Params, UserError
from fl_sim.sparsity import (
    Allocate,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    GlobalMagnitude,
    GrowAtRandom,
    Iterative,
    Linear,
    OneShot,
    PruneAndGrow,
    PruneTo,
    Random,
    RateDistortion,
    Schedule,
    StaticMask,
    chain,
    density,
    erk,
    global_topk,
    gradient,
    intersect,
    lamp,
    magnitude,
    no_mask,
    random,
    saliency,
    uniform,
)

SHAPES = {"a": (8, 3, 3, 3), "b": (16, 8, 3, 3), "c": (10, 16)}
TOTAL = 216 + 1152 + 160
CURVES = {name: [float(q * q) for q in range(11)] for name in SHAPES}
ALLOCATIONS: list[Allocate] = [global_topk, uniform, erk, lamp, GlobalMagnitude(0.3), RateDistortion(CURVES)]
GRADUAL: list[Schedule] = [Cubic(2, 9, 0.05), Linear(2, 9, 0.05), Exponential(2, 9, 0.05), Iterative(2, 2, 0.5, 0.05)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(seed: int = 0) -> Params:
    source = rng(seed)
    return {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}


def alive(mask: Mask) -> int:
    return sum(int(m.sum()) for m in mask.values())


def same(first: Mask, second: Mask) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize("schedule", GRADUAL)
def test_gradual_schedules_fall_from_one_to_their_end(schedule: Schedule) -> None:
    values = [schedule(number) for number in range(15)]
    assert values[:2] == [1.0, 1.0]
    assert values == sorted(values, reverse=True)
    assert values[10:] == pytest.approx([0.05] * 5)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(pickle.loads(pickle.dumps(schedule)))


def test_schedules_are_their_formulas() -> None:
    assert Constant(0.3)(7) == 0.3
    assert Linear(0, 10, 0.5)(5) == 0.75
    assert Exponential(0, 10, 0.25)(5) == 0.5
    assert 1 - Iterative(0, 1, 0.2, 0.01)(13) == pytest.approx(0.9560, abs=5e-5)  # 14 iterations in arXiv 2308.10438.
    assert [Cosine(0.3, 10)(n) for n in (0, 5, 10, 99)] == pytest.approx([0.3, 0.15, 0.0, 0.0])
    assert [Cubic(4, 4, 0.1)(n) for n in (4, 5)] == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Constant(1.2),
        lambda: OneShot(1, -0.1),
        lambda: Cubic(5, 2, 0.1),
        lambda: Exponential(0, 5, 0.0),
        lambda: Iterative(0, 0, 0.2, 0.1),
        lambda: Cosine(0.3, 0),
        lambda: PruneAndGrow(Constant(0.3), every=0),
    ],
)
def test_wrong_schedules_are_refused(wrong) -> None:
    with pytest.raises(UserError, match="must"):
        wrong()


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("schedule", GRADUAL)
def test_gradual_masks_are_nested_and_exact_while_weights_change(allocate: Allocate, schedule: Schedule) -> None:
    rule, mask = PruneTo(schedule, allocate=allocate), None
    for number in range(12):
        # Pruned weights come back in the parameters; some alive ones are exactly zero.
        params = {name: w * (torch.rand(w.shape, generator=rng(number)) > 0.1) for name, w in weights(number).items()}
        new = rule(number, mask, params, None)
        if number <= 1:
            assert new is None
        if new is not None:
            assert alive(new) == round(schedule(number) * TOTAL)
            if mask is not None:
                assert same(intersect(mask, new), new)
                assert (new is mask) == (alive(new) == alive(mask))
        mask = new


def test_nested_even_when_the_allocation_changes() -> None:
    first = PruneTo(Constant(0.2), allocate=global_topk)(1, None, weights(), None)
    assert first is not None
    for allocate in ALLOCATIONS:
        second = PruneTo(Constant(0.15), allocate=allocate)(2, first, weights(), None)
        assert second is not None
        assert alive(second) == round(0.15 * TOTAL)
        assert same(intersect(first, second), second)


def test_a_sparser_mask_is_never_filled_up() -> None:
    mask = PruneTo(Constant(0.1))(1, None, weights(), None)
    assert PruneTo(Constant(0.5))(2, mask, weights(), None) is mask


def test_survivors_of_every_tensor() -> None:
    params = weights()
    params["a"] *= 1e-3
    mask = PruneTo(Constant(0.05))(1, None, params, None)
    assert mask is not None
    assert not mask["a"].any()
    mask = PruneTo(Constant(0.05), min_keep=7)(1, None, params, None)
    assert mask is not None
    assert int(mask["a"].sum()) == 7
    assert float(params["a"].abs()[mask["a"]].min()) >= float(params["a"].abs()[~mask["a"]].max())
    # What an earlier rule emptied stays empty, whatever the minimum.
    emptied = {name: m & (name != "a") for name, m in mask.items()}
    later = PruneTo(Constant(0.02), min_keep=7)(2, emptied, params, None)
    assert later is not None
    assert not later["a"].any()
    assert alive(later) == round(0.02 * TOTAL)


def test_saliency_and_random_scores_fit_the_slot() -> None:
    params, grads = weights(), weights(1)
    mask = PruneTo(Constant(0.1), score=saliency)(1, None, params, grads)
    assert mask is not None
    product = torch.cat([(params[n] * grads[n]).abs().flatten() for n in params])
    chosen = torch.cat([mask[n].flatten() for n in params])
    assert float(product[chosen].min()) >= float(product[~chosen].max())
    with pytest.raises(UserError, match="gradients"):
        PruneTo(Constant(0.1), score=saliency)(1, None, params, None)
    rule = PruneTo(Cubic(0, 4, 0.1), score=Random(3))
    masks = [rule(n, None, weights(n), None) for n in (2, 4)]
    assert masks[0] is not None
    assert masks[1] is not None
    assert same(intersect(*masks), masks[1])  # type: ignore[arg-type]


def test_scores() -> None:
    params, grads = {"w": torch.tensor([-2.0, 3.0])}, {"w": torch.tensor([4.0, -1.0]), "other": torch.ones(1)}
    assert magnitude(params)["w"].tolist() == [2, 3]
    assert saliency(params, grads)["w"].tolist() == [8, 3]
    assert gradient(params, grads)["w"].tolist() == [4, 1]
    assert list(gradient(params, grads)) == ["w"]
    assert torch.equal(random(params, rng(2))["w"], random(params, rng(2))["w"])
    assert not torch.equal(random(params, rng(2))["w"], random(params, rng(3))["w"])


def test_rigl_grows_the_largest_gradients_and_set_at_random() -> None:
    params, grads = weights(), weights(1)
    start = PruneTo(Constant(0.2), allocate=erk)(0, None, params, None)
    assert start is not None
    for rule in (PruneAndGrow(Constant(0.3), every=2), PruneAndGrow(Constant(0.3), grow=GrowAtRandom(5))):
        new = rule(2, start, params, grads)
        assert new is not None
        for name, old in start.items():
            dropped, grown = old & ~new[name], new[name] & ~old
            count = min(int(0.3 * int(old.sum())), int((~old).sum()))
            assert int(dropped.sum()) == int(grown.sum()) == count
    rigl = PruneAndGrow(Constant(0.3))(2, start, params, grads)
    assert rigl is not None
    grown, rest = rigl["b"] & ~start["b"], ~rigl["b"] & ~start["b"]
    assert float(grads["b"].abs()[grown].min()) >= float(grads["b"].abs()[rest].max())


def test_exchanges_happen_when_they_are_due() -> None:
    params, grads = weights(), weights(1)
    mask = PruneTo(Constant(0.2))(0, None, params, None)
    rule = PruneAndGrow(Cosine(0.3, 10), every=3)
    changed = [n for n in range(1, 14) if rule(n, mask, params, grads) is not mask]
    assert changed == [3, 6, 9]
    assert rule(3, None, params, grads) is None
    draws = [GrowAtRandom(1)(n, params, None)["a"] for n in (1, 2)]
    assert not torch.equal(*draws)
    assert torch.equal(draws[0], GrowAtRandom(1)(1, weights(9), None)["a"])


def test_chains_pass_the_mask_on_and_keep_the_density() -> None:
    rule, mask = chain(PruneTo(Cubic(1, 8, 0.1)), PruneAndGrow(Constant(0.2), every=2)), None
    for number in range(1, 14):
        mask = rule(number, mask, weights(number), weights(100 + number))
        if mask is not None:
            assert alive(mask) == round(Cubic(1, 8, 0.1)(number) * TOTAL)
    assert chain()(3, mask, weights(), None) is mask
    assert mask is not None
    assert density(mask) == pytest.approx(0.1, abs=1e-3)


def test_rules_that_do_not_look() -> None:
    given = {name: torch.rand(shape, generator=rng()) > 0.5 for name, shape in SHAPES.items()}
    assert no_mask(1, None, weights(), None) is None
    assert no_mask(1, given, weights(), None) is given
    assert StaticMask(given)(1, None, weights(), None) is given
    assert alive(given) != alive(PruneTo(Constant(0.1))(1, given, weights(), None) or {})


def test_rules_print_compare_hash_and_pickle() -> None:
    rules: list[MaskRule] = [
        PruneTo(Cubic(1, 8, 0.1), allocate=GlobalMagnitude(0.05, "published"), min_keep=3),
        PruneTo(OneShot(2, 0.1), score=Random(1)),
        PruneAndGrow(Cosine(0.3, 75), every=5, grow=GrowAtRandom(1)),
        chain(PruneTo(OneShot(2, 0.1)), PruneAndGrow(Constant(0.1))),
    ]
    for rule in rules:
        back = pickle.loads(pickle.dumps(rule))
        assert back == rule
        assert hash(back) == hash(rule)
        assert repr(back) == repr(rule)
    assert all(first != second for first, second in itertools.combinations(rules, 2))


def test_nothing_is_mutated() -> None:
    params, grads, rule = weights(), weights(1), chain(PruneTo(Constant(0.1)), PruneAndGrow(Constant(0.5)))
    mask: Mask = {name: torch.rand(shape, generator=rng()) > 0.3 for name, shape in SHAPES.items()}
    before: tuple[Params, Grads, Mask] = (
        {n: p.clone() for n, p in params.items()},
        {n: g.clone() for n, g in grads.items()},
        {n: m.clone() for n, m in mask.items()},
    )
    rule(1, mask, params, grads)
    assert all(same(now, then) for now, then in zip((params, grads, mask), before, strict=True))
