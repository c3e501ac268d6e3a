"""Robust and private aggregation against brute force, and what each bounds."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from federation import TINY, run_tiny, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import SHAPES, mask, params, state

from fl_sim import Experiment, Report, load, local_sgd, run, snapshot
from fl_sim.config import Target
from fl_sim.core.types import Params, Task, Update, UserError
from fl_sim.sparsity import Shared
from fl_sim.training.client import ClientContext
from strategies.aggregation import coverage_mean, zero_fill
from strategies.privacy import Accountant, PrivateMean
from strategies.robust import ClipNorm, Trimmed, coordinate_median

STATISTICS = ("bn.running_mean", "bn.running_var")
SEEDS = st.lists(st.integers(0, 60), min_size=0, max_size=7, unique=True)


def update(seed: int) -> Update:
    """Every third update is complete."""
    return Update(params(seed), seed + 1, mask(seed) if seed % 3 else None)


def column(updates: list[Update], name: str, place: int) -> list[float]:
    """The values that were sent for one coordinate."""
    return [
        float(u.params[name].reshape(-1)[place])
        for u in updates
        if u.mask is None or name not in u.mask or bool(u.mask[name].reshape(-1)[place])
    ]


def check_coordinatewise(got: Params, updates: list[Update], pick) -> None:
    old = state().params
    for name, value in got.items():
        for place in range(value.numel()):
            sent = column(updates, name, place)
            expected = pick(sent) if sent else float(old[name].reshape(-1)[place])
            assert float(value.reshape(-1)[place]) == pytest.approx(expected, rel=1e-6, abs=1e-7), (name, place)


@given(SEEDS)
@settings(deadline=None)
def test_median_is_the_median_of_those_who_sent(seeds: list[int]) -> None:
    updates = [update(seed) for seed in seeds]
    check_coordinatewise(coordinate_median(state(), updates), updates, statistics.median)


@given(SEEDS, st.sampled_from([0.0, 0.1, 0.25, 0.34, 0.49]))
@settings(deadline=None)
def test_trimmed_mean_is_the_mean_without_the_ends(seeds: list[int], share: float) -> None:
    def pick(values: list[float]) -> float:
        cut = math.floor(share * len(values))
        return statistics.fmean(sorted(values)[cut : len(values) - cut])

    updates = [update(seed) for seed in seeds]
    check_coordinatewise(Trimmed(share)(state(), updates), updates, pick)


@given(SEEDS)
@settings(deadline=None)
def test_the_order_of_clients_does_not_matter_to_order_statistics(seeds: list[int]) -> None:
    updates = [update(seed) for seed in seeds]
    for aggregate in (coordinate_median, Trimmed(0.2)):
        forth, back = aggregate(state(), updates), aggregate(state(), updates[::-1])
        assert all(torch.equal(forth[n], back[n]) for n in SHAPES)


@pytest.mark.parametrize("aggregate", [coordinate_median, Trimmed(0.3)])
@pytest.mark.parametrize("evil", [3e38, -3e38, 1e4])
def test_a_minority_cannot_leave_the_range_of_the_others(aggregate, evil: float) -> None:
    good = [Update(params(seed), 10) for seed in range(5)]
    bad = [Update({n: torch.full_like(v, evil) for n, v in params(9).items()}, 2**31 - 1) for _ in range(2)]
    got = aggregate(state(), [bad[0], *good, bad[1]])
    for name in SHAPES:
        values = torch.stack([u.params[name] for u in good])
        assert bool((got[name] >= values.min(0).values - 1e-6).all())
        assert bool((got[name] <= values.max(0).values + 1e-6).all())


@given(seed=st.integers(0, 60), bound=st.floats(1e-3, 20))
@settings(deadline=None)
def test_clipping_bounds_the_change_and_keeps_its_direction(seed: int, bound: float) -> None:
    old, sent = state(), update(seed)
    seen: list[Update] = []

    def spy(state, updates) -> Params:
        seen.extend(updates)
        return state.params

    ClipNorm(bound, spy)(old, [sent])
    (clipped,) = seen
    assert clipped.mask is sent.mask
    assert clipped.num_examples == sent.num_examples

    def change(u: Update) -> torch.Tensor:
        parts = []
        for name in SHAPES:
            if name not in STATISTICS:
                kept = torch.ones(SHAPES[name], dtype=torch.bool) if u.mask is None else u.mask.get(name)
                part = u.params[name] - old.params[name]
                parts.append((part if kept is None else torch.where(kept, part, 0.0)).reshape(-1).double())
        return torch.cat(parts)

    before, after = change(sent), change(clipped)
    assert float(after.norm()) <= bound * (1 + 1e-4) + 1e-5
    if float(before.norm()) <= bound:
        assert clipped is sent
    else:
        torch.testing.assert_close(after, before * bound / before.norm(), rtol=1e-4, atol=1e-5)
    for name in STATISTICS:
        assert torch.equal(clipped.params[name], sent.params[name])


def test_a_generous_bound_changes_nothing() -> None:
    updates = [update(seed) for seed in range(6)]
    plain, clipped = coverage_mean(state(), updates), ClipNorm(1e9)(state(), updates)
    assert all(torch.equal(plain[n], clipped[n]) for n in SHAPES)


@given(SEEDS.filter(len))
@settings(deadline=None)
def test_without_noise_and_bound_privacy_is_zero_fill_of_equal_clients(seeds: list[int]) -> None:
    updates = [Update(params(s), 1, mask(s) if s % 3 else None) for s in seeds]
    old = state()
    got = PrivateMean(clip=1e6, noise=1e-15, cohort=len(seeds), seed=0)(old, updates)
    expected = zero_fill(old, updates)
    for name in SHAPES:
        if name not in STATISTICS:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


@given(seeds=SEEDS, other=st.integers(61, 99), shared=st.booleans())
@settings(deadline=None)
def test_replacing_a_client_moves_the_sum_by_no_more_than_the_sensitivity(seeds, other: int, shared: bool) -> None:
    """Noise is the same on both sides, so the difference of the aggregates is the difference of the sums."""
    rule = Shared(0.5, 3) if shared else None
    aggregate = PrivateMean(clip=0.7, noise=1e-12, cohort=8, seed=5, shared=rule)
    old = state()
    sent = None if rule is None else rule(1, {name: old.params[name] for name in old.schema.prunable})
    rest, first, second = (
        [replace(one, mask=sent or one.mask) for one in map(update, each)] for each in (seeds, [60], [other])
    )
    one, two = aggregate(old, [*first, *rest]), aggregate(old, [*second, *rest])
    moved = torch.cat([(one[n] - two[n]).double().reshape(-1) for n in SHAPES if n != "bn.running_var"])
    assert float(moved.norm()) <= 2 * 0.7 / 8 + 1e-5


def test_noise_has_the_stated_deviation_and_is_on_every_coordinate() -> None:
    big = {"conv.weight": torch.zeros(200, 100), "fc.weight": torch.zeros(50, 10)}
    from fl_sim.codecs import Schema
    from fl_sim.core.types import FlatParams
    from strategies.server_step import ServerState

    schema = Schema.of(big, ["conv.weight"])
    old = ServerState(schema, FlatParams.pack({n: big[n] for n in schema.names}))
    nothing_sent = {"conv.weight": torch.zeros(200, 100, dtype=torch.bool)}
    got = PrivateMean(clip=0.5, noise=2.0, cohort=10, seed=1)(old, [Update(big, 5, nothing_sent)])
    for value in got.values():
        assert bool((value != 0).all())
    assert float(got["conv.weight"].std()) == pytest.approx(2 * 0.5 * 2.0 / 10, rel=0.03)
    on_mask = PrivateMean(clip=0.5, noise=2.0, cohort=10, seed=1, shared=Shared(0.25, 1))(old, [])
    assert torch.equal(
        on_mask["conv.weight"] != 0, Shared(0.25, 1)(1, {"conv.weight": big["conv.weight"]})["conv.weight"]
    )


def test_epsilon_agrees_with_the_gaussian_mechanism_and_grows() -> None:
    """A cohort of everybody is no subsampling: the bound must be near the analytic Gaussian mechanism (Balle and Wang, 2018)."""
    noise, delta = 2.0, 1e-5

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    def exact(epsilon: float) -> float:
        return phi(0.5 / noise - epsilon * noise) - math.exp(epsilon) * phi(-0.5 / noise - epsilon * noise)

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if exact(middle) > delta else (low, middle)
    got = Accountant(noise, 100, 100, delta)(1)["epsilon"]
    assert high <= got <= 1.35 * high
    one, ten = (Accountant(noise, 10, 100, delta)(rounds)["epsilon"] for rounds in (1, 10))
    assert one < ten < got * 10
    assert Accountant(noise, 10, 1000, delta)(10)["epsilon"] < ten


def attacked(task: Task, ctx: ClientContext) -> Update:
    """Honest, but the smallest clients send their change times -50."""
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.1, rng=ctx.rng)
    made = snapshot(model)
    if ctx.num_examples < task.config["below"]:
        made = {n: task.params[n] - 50 * (v - task.params[n]) if "running" not in n else v for n, v in made.items()}
    return Update(made, ctx.num_examples)


def test_robust_rules_survive_an_attack_that_ruins_the_mean(tmp_path: Path) -> None:
    def accuracy(*options: str) -> float:
        tree = {**TINY, "client": {"target": f"{__name__}:attacked", "below": 120}, "cohort": {"size": 6}, "rounds": 5}
        overrides = ["data.partition=quantity", "strategy.target=strategies.presets:fedavg", *options]
        return run(Experiment.from_tree(tree, [f'out="{tmp_path}"', *overrides])).summary["accuracy"]["final"]

    assert accuracy() < 0.5
    assert accuracy("strategy.aggregate=median") > 0.7
    assert accuracy("strategy.aggregate=trimmed", "strategy.trim=0.4") > 0.7
    assert accuracy("strategy.clip=2.0") > 0.5


def test_the_private_preset_runs_and_shows_its_epsilon(tmp_path: Path) -> None:
    options = ["model.name=cnn", "strategy.target=strategies.presets:private", "strategy.noise=0.3"]
    report = run_tiny(tmp_path / "all", *options)
    spent = [row["epsilon"] for row in report.rounds]
    assert 0 < spent[0] < spent[1]
    shared = [
        *options,
        "client.target=clients.presets:shared_random",
        "client.density=0.2",
        "strategy.shared_density=0.2",
    ]
    sparse = run_tiny(tmp_path / "shared", *shared)
    assert [row["epsilon"] for row in sparse.rounds] == spent
    nnz = sparse.ledger.total(by=("client", "round", "direction"), column="nnz")
    assert len({count for (_, number, direction), count in nnz.items() if direction == "up" and number == 1}) == 1


def test_a_run_whose_aggregate_overflows_stops_in_one_line(tmp_path: Path) -> None:
    tree = {**TINY, "client": f"{__name__}:huge", "cohort": {"size": 6}}
    with pytest.raises(RuntimeError, match="the aggregate overflows"):
        run(Experiment.from_tree(tree, [f'out="{tmp_path}"']))


def huge(task: Task, ctx: ClientContext) -> Update:
    """Finite, but the variance between two such means is not."""
    return Update(
        {n: v + (3e38 if ctx.num_examples < 200 else -3e38) for n, v in task.params.items()}, ctx.num_examples
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trim": 0.5, "aggregate": "trimmed"}, "strategy.trim = 0.5"),
        ({"clip": 0.0}, "strategy.clip = 0"),
        ({"aggregate": "medain"}, "did you mean 'median'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Target(target="strategies.presets:fedavg", **options).build({})


def same(a: Report, b: Report) -> bool:
    return a.summary["params_sha256"] == b.summary["params_sha256"]


def test_an_unbinding_clip_is_fedavg_in_a_whole_run(tmp_path: Path) -> None:
    preset = "strategy.target=strategies.presets:fedavg"
    assert same(run(tiny(tmp_path / "a")), run(tiny(tmp_path / "b", preset, "strategy.clip=1e9")))
