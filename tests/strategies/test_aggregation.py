"""Aggregation and the server step: laws."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import SHAPES, mask, params, state

from fl_sim.core import kernels
from fl_sim.core.types import Update, UserError
from strategies import accumulators
from strategies.aggregation import coverage_mean, zero_fill
from strategies.server_step import Momentum, server_step

AGGREGATES = pytest.mark.parametrize("aggregate", [coverage_mean, zero_fill])


@AGGREGATES
def test_one_client_is_that_client_exactly(aggregate) -> None:
    update = Update(params(1), 37)
    result = aggregate(state(), [update])
    assert all(torch.equal(result[n], update.params[n]) for n in SHAPES)


@AGGREGATES
@given(counts=st.lists(st.integers(1, 10_000), min_size=1, max_size=5))
@settings(deadline=None)
def test_full_masks_are_the_weighted_mean(aggregate, counts: list[int]) -> None:
    updates = [Update(params(i), n, {"conv.weight": torch.ones(3, 2, dtype=torch.bool)}) for i, n in enumerate(counts)]
    dense = [Update(u.params, u.num_examples) for u in updates]
    result, plain = aggregate(state(), updates), aggregate(state(), dense)
    for name in SHAPES:
        assert torch.equal(result[name], plain[name])
    for name in ("conv.weight", "bn.weight", "bn.running_mean"):
        expected = sum(n * params(i)[name].double() for i, n in enumerate(counts)) / sum(counts)
        torch.testing.assert_close(result[name].double(), expected, rtol=1e-6, atol=1e-6)


@AGGREGATES
def test_mean_of_equals_is_identity(aggregate) -> None:
    result = aggregate(state(), [Update(params(5), n) for n in (3, 4, 9)])
    for name in SHAPES:
        torch.testing.assert_close(result[name], params(5)[name], rtol=1e-6, atol=1e-7)


@AGGREGATES
@pytest.mark.parametrize("masked", [False, True])
def test_a_fold_without_a_compiler_gives_the_same_bits(
    aggregate, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [Update(params(i), 3 + i, mask(i) if masked and i != 1 else None) for i in range(5)]
    chosen = aggregate(state(), updates)
    monkeypatch.setattr(accumulators, "add_scaled", kernels.reference.add_scaled)
    monkeypatch.setattr(accumulators, "add_sent", kernels.reference.add_sent)
    plain = aggregate(state(), updates)
    assert all(torch.equal(plain[name], chosen[name]) for name in SHAPES)


@AGGREGATES
def test_an_update_is_given_back_before_the_next_is_asked_for(aggregate) -> None:
    def arriving() -> Iterator[Update]:
        last: list[weakref.ref[torch.Tensor]] = []
        for seed in range(3):
            assert all(ref() is None for ref in last)
            made = [Update(params(seed), 1)]
            last.append(weakref.ref(made[0].params["bn.weight"]))
            yield made.pop()

    aggregate(state(), arriving())


def test_disjoint_masks_copy_each_owner_and_keep_the_rest() -> None:
    first = {"conv.weight": torch.tensor([[1, 0], [0, 1], [0, 0]], dtype=torch.bool)}
    second = {"conv.weight": torch.tensor([[0, 1], [0, 0], [0, 0]], dtype=torch.bool)}
    old = state()
    got = coverage_mean(old, [Update(params(1), 10, first), Update(params(2), 90, second)])["conv.weight"]
    expected = old.params["conv.weight"].clone()
    expected[first["conv.weight"]] = params(1)["conv.weight"][first["conv.weight"]]
    expected[second["conv.weight"]] = params(2)["conv.weight"][second["conv.weight"]]
    assert torch.equal(got, expected)


@given(seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True))
@settings(deadline=None)
def test_masked_means_equal_their_formulas(seeds: list[int]) -> None:
    old = state()
    updates = [Update(params(s), s + 1, mask(s) if s % 3 else None) for s in seeds]
    base = old.params["conv.weight"].double()
    total = torch.zeros(3, 2, dtype=torch.float64)
    covered = torch.zeros(3, 2, dtype=torch.float64)
    for u in updates:
        m = (u.mask["conv.weight"] if u.mask else torch.ones(3, 2)).double()
        total += u.num_examples * m * (u.params["conv.weight"].double() - base)
        covered += u.num_examples * m
    coverage = base + torch.where(covered > 0, total / covered.clamp(min=1), torch.zeros(()).double())
    filled = base + total / sum(u.num_examples for u in updates)
    torch.testing.assert_close(coverage_mean(old, updates)["conv.weight"].double(), coverage, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(zero_fill(old, updates)["conv.weight"].double(), filled, rtol=1e-5, atol=1e-6)


def test_variance_follows_the_law_of_total_variance() -> None:
    """Pooled statistics of two samples from the statistics of each."""
    rng = torch.Generator().manual_seed(0)
    samples = [torch.randn(200, 3, generator=rng), 4 + 2 * torch.randn(50, 3, generator=rng)]
    updates = []
    for sample in samples:
        p = params(1)
        p["bn.running_mean"], p["bn.running_var"] = sample.mean(0), sample.var(0, unbiased=False)
        updates.append(Update(p, len(sample)))
    pooled = torch.cat(samples)
    result = coverage_mean(state(), updates)
    torch.testing.assert_close(result["bn.running_mean"], pooled.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result["bn.running_var"], pooled.var(0, unbiased=False), rtol=1e-5, atol=1e-5)


def test_the_step_is_pure_and_counts_rounds() -> None:
    old = state()
    before = old.schema.flat(old.params).clone()
    new = server_step(old, iter([Update(params(1), 2), Update(params(2), 5)]), aggregate=coverage_mean)
    assert torch.equal(old.schema.flat(old.params), before)
    assert (old.round, new.round) == (0, 1)


def test_server_momentum_follows_fedavgm() -> None:
    old = state()
    step = Momentum(lr=0.5, beta=0.9)
    one = server_step(old, [Update(params(1), 1)], aggregate=coverage_mean, optimise=step)
    two = server_step(one, [Update(params(2), 1)], aggregate=coverage_mean, optimise=step)
    w0, w1, w2 = old.params["bn.weight"], params(1)["bn.weight"], params(2)["bn.weight"]
    v1 = w0 - w1
    x1 = w0 - 0.5 * v1
    torch.testing.assert_close(one.params["bn.weight"], x1)
    torch.testing.assert_close(two.params["bn.weight"], x1 - 0.5 * ((x1 - w2) + 0.9 * v1))
    assert torch.equal(two.params["bn.running_var"], params(2)["bn.running_var"])


def test_the_mask_is_applied_and_sees_the_pseudo_gradient() -> None:
    old = state()
    seen = {}

    def rule(number, current, weights, grads):
        seen.update(number=number, grads=grads)
        return {"conv.weight": weights["conv.weight"] > 0}

    new = server_step(old, [Update(params(1), 1)], aggregate=coverage_mean, adjust_mask=rule)
    assert seen["number"] == 1
    assert torch.equal(seen["grads"]["conv.weight"], old.params["conv.weight"] - params(1)["conv.weight"])
    assert bool((new.params["conv.weight"] >= 0).all())
    assert torch.equal(new.params["conv.weight"] > 0, new.mask["conv.weight"])


def test_a_name_that_only_a_later_round_returns_is_refused() -> None:
    def rule(state, updates):
        return {**dict(next(iter(updates)).params), **({"stranger": torch.ones(1)} if state.round else {})}

    one = server_step(state(), [Update(params(1), 1)], aggregate=rule)
    with pytest.raises(UserError, match="returned 'stranger', which the model lacks"):
        server_step(one, [Update(params(1), 1)], aggregate=rule)
