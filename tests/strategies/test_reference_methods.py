"""Methods against references of their own: each paper's algorithm written down in NumPy, next to none of our code.

Clients take whole-batch steps, so that the order of the samples plays no part; the references compute in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from softmax_federation import LR, SIZES, Array, experiment, gradient, joined, local, loss, weighted

from fl_sim import run
from fl_sim.codecs import Schema
from fl_sim.core.types import Update, UserError
from fl_sim.simulation.federation import Federation
from fl_sim.training.loop import Training
from strategies import presets
from strategies.corrections import FairMean, NormalisedMean
from strategies.server_step import ServerState

Reference = Callable[[Array, list[list[int]]], Array]
"""(first parameters, cohort of each round) -> last parameters."""


def fedavgm(w: Array, cohorts: list[list[int]]) -> Array:
    velocity = np.zeros_like(w)
    for cohort in cohorts:
        velocity = 0.9 * velocity + (w - weighted(w, cohort))
        w = w - velocity
    return w


def fedopt(second: Callable[[Array, Array], Array], beta1: float) -> Reference:
    def algorithm(w: Array, cohorts: list[list[int]]) -> Array:
        m, v = np.zeros_like(w), np.full_like(w, 1e-3**2)
        for cohort in cohorts:
            delta = weighted(w, cohort) - w
            m = beta1 * m + (1 - beta1) * delta
            v = second(v, delta**2)
            w = w + 0.05 * m / (np.sqrt(v) + 1e-3)
        return w

    return algorithm


def scaffold(option: int, rates: Sequence[float] = (1, 1, 1, 1)) -> Reference:
    def algorithm(x: Array, cohorts: list[list[int]]) -> Array:
        c, own = np.zeros_like(x), [np.zeros_like(x) for _ in SIZES]
        for cohort, rate in zip(cohorts, rates, strict=True):
            moved, changed, lr = [], [], rate * LR
            for i in cohort:
                y = local(x, i, lambda _, i=i, c=c: c - own[i], lr=lr)
                new = gradient(x, i) if option == 1 else own[i] - c + (x - y) / (2 * lr)
                moved.append(y - x)
                changed.append(new - own[i])
                own[i] = new
            x = x + 1.0 * np.mean(moved, axis=0)
            c = c + len(cohort) / len(SIZES) * np.mean(changed, axis=0)
        return x

    return algorithm


def feddyn(w: Array, cohorts: list[list[int]]) -> Array:
    alpha, h, own = 0.1, np.zeros_like(w), [np.zeros_like(w) for _ in SIZES]
    for cohort in cohorts:
        trained = []
        for k in cohort:
            theta = local(w, k, lambda y, k=k, w=w: -own[k] + alpha * (y - w))
            own[k] = own[k] - alpha * (theta - w)
            trained.append(theta)
        h = h - alpha / len(SIZES) * sum(theta - w for theta in trained)
        w = np.mean(trained, axis=0) - h / alpha
    return w


def fedprox(w: Array, cohorts: list[list[int]]) -> Array:
    for cohort in cohorts:
        trained = [local(w, k, lambda y, w=w: 0.5 * (y - w)) for k in cohort]
        w = np.average(trained, axis=0, weights=[SIZES[k] for k in cohort])
    return w


def qfedavg(w: Array, cohorts: list[list[int]]) -> Array:
    q, lipschitz = 2.0, 1 / LR
    for cohort in cohorts:
        deltas, h = [], []
        for k in cohort:
            change, f = lipschitz * (w - local(w, k)), loss(w, k)
            deltas.append(f**q * change)
            h.append(q * f ** (q - 1) * float((change**2).sum()) + lipschitz * f**q)
        w = w - sum(deltas) / sum(h)
    return w


def fednova(w: Array, cohorts: list[list[int]], rho: float = 0.5) -> Array:
    """With momentum and batches of 8, so that clients of other sizes take other numbers of steps."""
    for cohort in cohorts:
        p, directions, norms = np.array([SIZES[k] for k in cohort]) / sum(SIZES[k] for k in cohort), [], []
        for k in cohort:
            y, velocity, accumulated, norm = w, np.zeros_like(w), 0.0, 0.0
            for _ in range(-(-SIZES[k] // 8)):
                velocity, accumulated = rho * velocity + gradient(y, k, 1), rho * accumulated + 1
                y, norm = y - LR * velocity, norm + accumulated
            directions.append((w - y) / (LR * norm))
            norms.append(norm)
        w = w - sum(p * norms) * LR * np.tensordot(p, directions, axes=1)
    return w


SHORT = ("training.batch_size=8", "training.epochs=1", "training.momentum=0.5")
ONE_SAMPLE = "data.source=softmax_federation:one_sample_each"
METHODS: Mapping[str, tuple[Reference, str, str, tuple[str, ...]]] = {
    "FedAvgM": (fedavgm, "fedavg", "fedavgm", ()),
    "FedAdam": (fedopt(lambda v, s: 0.99 * v + 0.01 * s, 0.9), "fedavg", "fedadam", ("strategy.lr=0.05",)),
    "FedYogi": (fedopt(lambda v, s: v - 0.01 * s * np.sign(v - s), 0.9), "fedavg", "fedyogi", ("strategy.lr=0.05",)),
    "FedAdagrad": (fedopt(lambda v, s: v + s, 0.0), "fedavg", "fedadagrad", ("strategy.lr=0.05",)),
    "SCAFFOLD I": (scaffold(1), "scaffold", "scaffold", ("client.option=1",)),
    "SCAFFOLD II": (scaffold(2, (1 / 3, 2 / 3, 1, 1)), "scaffold", "scaffold", ("training.warmup=2",)),
    "FedDyn": (feddyn, "feddyn", "feddyn", ("strategy.alpha=0.1",)),
    "FedProx": (fedprox, "fedprox", "fedavg", ("client.mu=0.5",)),
    "FedNova": (fednova, "fednova", "fednova", (*SHORT, ONE_SAMPLE)),
    "FedNova, momentum 1": (
        partial(fednova, rho=1.0),
        "fednova",
        "fednova",
        (*SHORT, "training.momentum=1", ONE_SAMPLE),
    ),
    "q-FedAvg": (qfedavg, "qfedavg", "qfedavg", ("strategy.q=2.0",)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_paper_s_algorithm(method: str, tmp_path: Path) -> None:
    reference, client, strategy, options = METHODS[method]
    named = [f"client.target=clients.presets:{client}", f"strategy.target=strategies.presets:{strategy}"]
    asked = experiment(tmp_path, *named, *options)
    report, start = run(asked, quiet=True), joined(Federation.build(asked, quiet=True).first.start)
    rows, clients = report.ledger.column("round"), report.ledger.column("client")
    cohorts = [sorted(set(clients[rows == number].tolist())) for number in range(1, 5)]
    expected = reference(start, cohorts)
    assert np.abs(expected - start).max() > 0.02, "the reference moves"
    np.testing.assert_allclose(joined(report.params), expected, atol=2e-5)


LOSSES: Mapping[str, tuple[float, Sequence[float]]] = {
    "as at the start": (1, (2.3, 2.2, 2.1)),
    "small": (5, (0.03, 0.02, 0.01)),
    "the last far larger": (10, (1e-4, 0.02, 2.0)),
    "the first far larger": (10, (2.0, 0.02, 1e-4)),
    "powers beyond float32": (100, (3.0, 2.0, 2.0)),
    "powers below float64": (100, (2e-4, 1e-4, 1e-4)),
}


def updates_of(extra: str, reported: Sequence[float]) -> tuple[Array, list[Array], ServerState, list[Update]]:
    """(old parameters, each client's change, the state, the updates) of clients that report a number beside their change."""
    rng = np.random.default_rng(3)
    old = rng.normal(size=500).astype(np.float32) * 0.1
    trained = [(old + rng.normal(size=500) * 0.1).astype(np.float32) for _ in reported]
    schema = Schema.of({"w": torch.from_numpy(old)}, ["w"])
    state = ServerState(schema, schema.view(torch.from_numpy(old)))
    updates = [
        Update({"w": torch.from_numpy(new)}, 10, extra={extra: {extra: torch.tensor([value])}})
        for new, value in zip(trained, reported, strict=True)
    ]
    return old.astype(float), [new.astype(float) - old for new in trained], state, updates


@pytest.mark.parametrize("case", LOSSES)
def test_q_fedavg_takes_its_step_whatever_the_size_of_the_losses_powers(case: str) -> None:
    q, losses = LOSSES[case]
    old, changes, state, updates = updates_of("loss", losses)
    f = np.float32(losses).astype(float)
    power = (f / f.max()) ** q  # F^q in a unit that cancels out
    h = sum(p * (q / loss * float((d**2).sum()) / LR**2 + 1 / LR) for p, loss, d in zip(power, f, changes, strict=True))
    expected = sum(p * d for p, d in zip(power, changes, strict=True)) / LR / h
    found = FairMean(q, Training(lr=LR))(state, updates)["w"].double().numpy() - old
    assert np.linalg.norm(found - expected) < 3e-8 * np.linalg.norm(old) + 1e-5 * np.linalg.norm(expected)


def test_powers_of_losses_that_no_float32_holds_together_are_said() -> None:
    _, _, state, updates = updates_of("loss", (0.1, 2.0))
    with pytest.raises(UserError, match=r"strategy.q = 100: in round 1 .* losses of 0.1 and 2, .* lower strategy.q"):
        FairMean(100, Training(lr=LR))(state, updates)


def test_fednova_rounds_no_change_that_is_divided_by_many_steps() -> None:
    steps = (3e6, 1e6, 2e6)
    old, changes, state, updates = updates_of("steps", steps)
    expected = np.mean(steps) * np.mean([d / taken for d, taken in zip(changes, steps, strict=True)], axis=0)
    found = NormalisedMean()(state, updates)["w"].double().numpy() - old
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def test_statistics_are_never_fed_to_an_optimiser() -> None:
    params = {"w": torch.zeros(3), "bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2)}
    schema = Schema.of(params, ["w"])
    state = ServerState(schema, schema.view(schema.flat(params)))
    aggregated = {name: value + 0.5 for name, value in params.items()}
    for method in (presets.fedadam(), presets.fedyogi(), presets.fedadagrad(), presets.fedavgm(lr=0.5)):
        new, _ = method.optimise(state, schema.view(schema.flat(aggregated)))
        assert torch.equal(new["bn.running_mean"], aggregated["bn.running_mean"])
        assert torch.equal(new["bn.running_var"], aggregated["bn.running_var"])
        assert not torch.equal(new["w"], aggregated["w"])


def test_a_pruned_weight_that_grows_again_starts_without_moments() -> None:
    schema = Schema.of({"w": torch.zeros(2)}, ["w"])
    step = presets.fedadam().optimise
    _, memory = step(ServerState(schema, {"w": torch.zeros(2)}), schema.view(torch.tensor([1.0, 1.0])))
    pruned = ServerState(schema, {"w": torch.zeros(2)}, mask={"w": torch.tensor([True, False])}, memory=memory)
    _, later = step(pruned, schema.view(torch.zeros(2)))
    assert later["m"][0] > 0
    assert later["m"][1] == 0
