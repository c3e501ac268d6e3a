"""Allocations: exact sums, floors, the published procedures against slow transcriptions of their descriptions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.core.types import Scores, UserError
from fl_sim.sparsity import (
    Allocate,
    GlobalMagnitude,
    RandomTopk,
    RateDistortion,
    erk,
    global_published,
    global_topk,
    lamp,
    topk_mask,
    uniform,
)
from fl_sim.sparsity.rate_distortion import kept_weights

SHAPES = [(3,), (2, 2), (1,), (4, 2), (5,), (3, 2, 1, 1), (9, 3), ()]
PLAIN: list[Allocate] = [global_topk, uniform, erk, lamp, RandomTopk(3), GlobalMagnitude()]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def scores(draw: st.DrawFn, *, levels: int = 6) -> Scores:
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5))
    source = rng(draw(st.integers(0, 10_000)))
    return {f"w{i}": torch.randint(0, levels, shape, generator=source).float() for i, shape in enumerate(shapes)}


def network(scale: float = 1.0, seed: int = 0) -> Scores:
    """Layers of very different sizes and magnitudes, as in ResNet-32."""
    shapes = [(16, 3, 3, 3)] + [(16, 16, 3, 3)] * 4 + [(32, 16, 3, 3), (32, 32, 3, 3), (64, 64, 3, 3), (10, 64)]
    sources = enumerate(shapes)
    return {
        f"layer{i}": scale * (0.5 + i % 3) * torch.randn(shape, generator=rng(seed + i)).abs() for i, shape in sources
    }


def total(some: Scores) -> int:
    return sum(s.numel() for s in some.values())


@given(some=scores(), density=st.floats(0, 1), least=st.integers(0, 4))
@settings(deadline=None, max_examples=examples(200))
def test_sums_are_exact_and_floors_hold(some: Scores, density: float, least: int) -> None:
    floors = {name: min(least, s.numel()) for name, s in some.items()}
    for allocate in PLAIN:
        if round(density * total(some)) < sum(floors.values()):
            with pytest.raises(UserError, match="largest feasible sparsity"):
                allocate(some, density, min_keep=least)
            continue
        keep = allocate(some, density, min_keep=least)
        assert list(keep) == list(some)
        assert sum(keep.values()) == round(density * total(some))
        assert all(floors[name] <= keep[name] <= s.numel() for name, s in some.items())
        assert {name: int(m.sum()) for name, m in topk_mask(some, keep).items()} == keep


def test_the_largest_feasible_sparsity_is_feasible() -> None:
    some = network()
    with pytest.raises(UserError) as caught:
        global_topk(some, 0.0, min_keep=40)
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    assert round((1 - largest) * total(some)) == 40 * len(some)
    keep = global_topk(some, 40 * len(some) / total(some), min_keep=40)
    assert set(keep.values()) == {40}


@pytest.mark.parametrize("allocate", PLAIN)
def test_more_density_keeps_more_everywhere_and_scale_does_not_matter(allocate: Allocate) -> None:
    some, scaled, before = network(), network(2.0**-9), {}
    for density in (0.01, 0.02, 0.05, 0.2, 0.5, 0.9, 1.0):
        keep = allocate(some, density)
        assert keep == allocate(scaled, density)
        # Largest remainders are not monotone to the last unit.
        assert all(keep[name] >= before.get(name, 0) - 1 for name in keep)
        before = keep
    assert before == {name: s.numel() for name, s in some.items()}


@given(some=scores(), density=st.floats(0, 1), least=st.integers(0, 3))
@settings(deadline=None, max_examples=examples(200))
def test_proportional_allocations_are_within_one_of_the_real_solution(some: Scores, density: float, least: int) -> None:
    """The real solution, found by bisection: clip(factor * share, floor, size) that sums to the budget."""
    budget = round(density * total(some))
    floors = {name: min(least, s.numel()) for name, s in some.items()}
    assume(budget >= sum(floors.values()))
    shares = {uniform: {n: s.numel() for n, s in some.items()}, erk: {n: max(1, sum(s.shape)) for n, s in some.items()}}
    for allocate, share in shares.items():
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            held = sum(max(floors[n], min(some[n].numel(), middle * share[n])) for n in some)
            low, high = (middle, high) if held < budget else (low, middle)
        keep = allocate(some, density, min_keep=least)
        for n in some:
            assert abs(keep[n] - max(floors[n], min(some[n].numel(), high * share[n]))) < 1 + 1e-6


def test_erk_fills_what_would_exceed_one_and_keeps_the_ratio_of_the_rest() -> None:
    some = {
        "tiny": torch.rand(2, 3, generator=rng()),
        "a": torch.rand(40, 50, generator=rng()),
        "b": torch.rand(80, 60),
    }
    keep = erk(some, 0.1)
    assert keep["tiny"] == 6
    assert keep["a"] / keep["b"] == pytest.approx((40 + 50) / (80 + 60), rel=0.01)


def test_uniform_of_a_convolution_is_its_own_density() -> None:
    keep = uniform(network(), 0.1)
    assert all(abs(keep[n] - 0.1 * s.numel()) < 1 for n, s in network().items())


def test_lamp_scores_are_those_of_the_definition() -> None:
    some = network()
    values = []
    for order, score in enumerate(some.values()):
        squares = score.flatten().double().square().sort().values
        values += [(-float(squares[i] / squares[i:].sum()), order) for i in range(len(squares))]
    expected = [0] * len(some)
    for _, order in sorted(values)[: round(0.03 * total(some))]:
        expected[order] += 1
    assert list(lamp(some, 0.03).values()) == expected


def test_nothing_is_allocated_to_nothing() -> None:
    assert all(allocate({}, 0.5) == {} for allocate in PLAIN)


def test_random_counts_ignore_the_scores() -> None:
    keep = RandomTopk(1)(network(), 0.1)
    assert keep == RandomTopk(1)({n: torch.zeros_like(s) for n, s in network().items()}, 0.1)
    assert keep != RandomTopk(2)(network(), 0.1)
    assert all(abs(keep[n] / s.numel() - 0.1) < 5 * (0.09 / s.numel()) ** 0.5 for n, s in network().items())


def transcribed(some: Scores, density: float, least: int) -> dict[str, int]:
    """The published steps as described, loop included: scale, clamp, until the target is met."""
    sizes, target = [s.numel() for s in some.values()], 1 - density
    everything = torch.cat([s.flatten() for s in some.values()])
    threshold = everything.kthvalue(max(1, int(target * len(everything)))).values
    sparsity = [float((s < threshold).double().mean()) for s in some.values()]
    sparsity = [0.0 if n < least else s for s, n in zip(sparsity, sizes, strict=True)]

    def achieved() -> float:
        return sum(s * n for s, n in zip(sparsity, sizes, strict=True)) / sum(sizes)

    for _ in range(5000):
        factor = target / achieved()
        sparsity = [s * factor for s in sparsity]
        sparsity = [
            1 - least / n if (1 - s) * n < least and n > least else s for s, n in zip(sparsity, sizes, strict=True)
        ]
        if achieved() >= target - 1e-12:
            break
    else:
        raise AssertionError("does not terminate")
    return {name: n - int(s * n) for name, s, n in zip(some, sparsity, sizes, strict=True)}


@pytest.mark.parametrize(("density", "least"), [(0.5, 0), (0.1, 20), (0.05, 40), (0.02, 60), (0.2, 200), (0.05, 300)])
def test_published_minimum_threshold_is_the_limit_of_its_loop(density: float, least: int) -> None:
    some = network(seed=7)
    keep, loop = global_published(some, density, min_keep=least), transcribed(some, density, least)
    assert sum(keep.values()) == round(density * total(some))
    assert all(abs(keep[name] - loop[name]) <= 2 for name in some)
    assert all(keep[name] >= min(least, s.numel()) for name, s in some.items())


def test_published_and_exact_differ_where_the_threshold_binds() -> None:
    some = network(seed=7)
    exact, published = global_topk(some, 0.02, min_keep=60), global_published(some, 0.02, min_keep=60)
    assert exact != published

    def kept_sum(keep: dict[str, int]) -> float:
        return sum(float(some[n][m].sum()) for n, m in topk_mask(some, keep).items())

    assert kept_sum(exact) > kept_sum(published)


def test_where_the_published_loop_never_ends_there_is_an_error() -> None:
    some = network()
    with pytest.raises(UserError, match="largest feasible sparsity"):
        global_published(some, 0.01, min_keep=100)
    whole = {"large": torch.arange(1.0, 9.0) + 10, "small": torch.arange(1.0, 9.0)}
    # The threshold prunes nothing in "large", and scaling nothing leaves nothing.
    with pytest.raises(UserError, match="published procedure"):
        global_published(whole, 0.5, min_keep=2)
    assert global_topk(whole, 0.5, min_keep=2) == {"large": 6, "small": 2}


def test_minimum_threshold_in_percent_of_everything() -> None:
    some = network()
    least = int(total(some) * 0.1 / 100)
    for mode, allocate in (("exact", global_topk), ("published", global_published)):
        assert GlobalMagnitude(0.1, mode)(some, 0.05) == allocate(some, 0.05, min_keep=least)
    assert min(GlobalMagnitude(0.1)(some, 0.01).values()) >= least
    with pytest.raises(UserError, match="exact, published"):
        GlobalMagnitude(0.1, "repo")
    with pytest.raises(UserError, match="percentage"):
        GlobalMagnitude(-1)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_densities_that_are_none(density: float) -> None:
    for allocate in PLAIN:
        with pytest.raises(UserError, match="between 0 and 1"):
            allocate(network(), density)


def test_rate_distortion_follows_its_curves_and_sums_exactly() -> None:
    some = {"a": torch.rand(10, 10, generator=rng()), "b": torch.rand(100, generator=rng(1))}
    steep, flat = [q**2 * 10.0 for q in range(11)], [q**2 * 1.0 for q in range(11)]
    keep = RateDistortion({"a": steep, "b": flat})(some, 0.5)
    assert keep == {"a": 90, "b": 10}
    assert RateDistortion({"a": flat, "b": steep})(some, 0.5) == {"a": 10, "b": 90}
    assert sum(RateDistortion({"a": steep, "b": flat})(some, 0.457).values()) == round(0.457 * 200)
    assert RateDistortion({"a": steep, "b": flat})(some, 0.1) == {"a": 20, "b": 0}
    assert RateDistortion({"a": steep, "b": flat})(some, 0.1, min_keep=9) == {"a": 10, "b": 10}
    with pytest.raises(UserError, match=r"curves: none .* b"):
        RateDistortion({"a": steep})(some, 0.5)


def test_rate_distortion_does_not_revive_what_is_pruned() -> None:
    some = {"a": torch.rand(100, generator=rng()) + 1, "b": torch.rand(100, generator=rng(1)) + 1}
    some["a"][30:] = 0
    keep = RateDistortion({"a": [q**2 * 10.0 for q in range(11)], "b": [0.0] * 11})(some, 0.5)
    assert keep == {"a": 30, "b": 70}


def test_kept_weights_are_exact() -> None:
    assert kept_weights(7, 4) == [7, 5, 3, 0]
    assert all(k == n - int(Fraction(q, 100) * n) for n in (1, 99, 2304) for q, k in enumerate(kept_weights(n, 101)))
