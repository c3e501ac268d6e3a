"""One config, one result: final parameters, metrics and ledger, whatever carries the messages and however often it stops.

Every method on the left with every way of running on the right; Ray's and the second worker count are slow tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
from federation import run_tiny, same, tiny
from grids import Shuffled, inline_is
from interruption import KillAfter, Killed

from fl_sim import Report, run
from fl_sim.communication.flower_private import identified
from fl_sim.simulation import resume

FEW = ("rounds=3", "training.steps=2")
METHODS: Mapping[str, Sequence[str]] = {
    "dense": FEW,
    "adaptive": (
        *FEW,
        "client.target=clients.presets:adaptive_pruning",
        "gating.macs_budget=0.5",
        "client.density=0.3",
    ),
    "global-pruned": (
        *FEW,
        "strategy.target=strategies.presets:gradual_magnitude",
        "strategy.density=0.2",
        "strategy.end=2",
    ),
    "batchnorm-only": (*FEW, "model.name=resnet14", "model.trainable=batchnorm"),
}
Way = Callable[[Path, Sequence[str], pytest.MonkeyPatch], Report]


def shuffled(out: Path, options: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Report:
    inline_is(monkeypatch, Shuffled)
    return run_tiny(out, *options)


def on(*engine: str) -> Way:
    return lambda out, options, _: run_tiny(out, *options, *engine)


def resumed(before: Sequence[str], after: Sequence[str]) -> Way:
    """Killed in the middle of round 2, and gone on with."""

    def way(out: Path, options: Sequence[str], _: pytest.MonkeyPatch) -> Report:
        with pytest.raises(Killed):
            run(tiny(out, *options, *before), KillAfter(1, 2))
        return resume(tiny(out, *options, *after))

    return way


WORKERS = ("engine=workers", "workers.count=2")
RAY = ("engine=ray", "ray.workers=2")
WAYS: Mapping[str, Way] = {
    "any order of replies": shuffled,
    "2 workers": on(*WORKERS),
    "resumed": resumed((), ()),
}
SLOW: Mapping[str, Way] = {
    "1 worker": on("engine=workers", "workers.count=1"),
    "3 workers": on("engine=workers", "workers.count=3"),
    "resumed on workers": resumed((), WORKERS),
    "Ray, 1 worker": on("engine=ray", "ray.workers=1"),
    "Ray, 2 workers": on(*RAY),
    "begun on Ray, resumed inline": resumed(RAY, ()),
    "begun on workers, resumed on Ray": resumed(WORKERS, RAY),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """A method's run on the inline engine."""
    return cache(lambda method: run_tiny(tmp_path_factory.mktemp(method), *METHODS[method]))


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in SLOW)])
@pytest.mark.parametrize("method", METHODS)
def test_same_parameters_metrics_and_ledger(
    tmp_path: Path, whole: Callable[[str], Report], monkeypatch: pytest.MonkeyPatch, method: str, way: str
) -> None:
    inline = whole(method)
    same(inline, {**WAYS, **SLOW}[way](tmp_path, METHODS[method], monkeypatch))


def test_a_flower_run_of_the_same_process_leaves_no_longer_run_id(tmp_path: Path) -> None:
    """Flower's simulation gives its process a run id of ten bytes, which every message would carry on."""
    with identified(2**62):
        after = run_tiny(tmp_path / "after", "rounds=1")
    same(run_tiny(tmp_path / "alone", "rounds=1"), after)
