"""`fl-sim bench engine` on tiny federations: what it reports, not how fast anything is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from fl_sim import models
from fl_sim.bench import apps, contest, engine, flower, tasks
from fl_sim.bench.bare import Bare, spread
from fl_sim.bench.idle import idle_shares
from fl_sim.bench.show import markdown
from fl_sim.bench.workloads import B0, B0_SMALL, RESNET32, Workload
from fl_sim.core.types import UserError

TINY = Workload("cnn", clients=8, cohort=2, steps=1, width=0.05, batch=4)


def with_quartiles(name: str) -> set[str]:
    return {name, f"{name}_q1", f"{name}_q3"}


@pytest.mark.slow
def test_an_engine_beside_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "START_S", 0.01)
    found = engine.beside_limit("tiny", TINY, repeats=2, suffix="_x", engines=["inline"])
    rates = {f"tiny_fits_per_s_{who}_x" for who in ("limit1", "inline")}
    assert found.keys() == rates | with_quartiles("inline_x_over_limit")
    assert all(isinstance(value, float) and value > 0 for value in found.values())


def test_a_contestant_is_alone_while_it_is_timed() -> None:
    seen: list[str] = []

    @contextmanager
    def opened(name: str) -> Iterator[Callable[[], None]]:
        seen.append(f"start {name}")
        yield lambda: seen.append(name)
        seen.append(f"end {name}")

    found = contest.each_alone({name: partial(opened, name) for name in "ab"}, starts=2, warmup=1)
    turns = [word for word in seen if " " in word]
    assert turns == [f"{what} {name}" for _ in range(2) for name in "ab" for what in ("start", "end")]
    assert seen.count("a") == seen.count("b") == 2 * (1 + contest.START_ROUNDS)
    assert all(len(one.seconds) == 2 and one.best == min(one.seconds) for one in found.values())


def test_the_workloads_are_what_they_are_called() -> None:
    sizes = [sum(p.numel() for p in models.build(w.model, width=w.width).parameters()) for w in (B0, B0_SMALL)]
    assert sizes == [1_626_442, 50_624]
    assert (RESNET32.cohort, RESNET32.steps * RESNET32.batch) == (4, 256)


def test_bare_steps_are_those_of_sgd() -> None:
    """The limit trains: as many steps as the federation's clients do."""
    seen: list[torch.Size] = []
    forward = torch.nn.Conv2d.forward
    try:
        torch.nn.Conv2d.forward = lambda self, x: seen.append(x.shape) or forward(self, x)  # type: ignore[method-assign]
        Bare.of(TINY).start()(3)
    finally:
        torch.nn.Conv2d.forward = forward  # type: ignore[method-assign]
    assert [shape[0] for shape in seen] == [4] * (2 * 3)


def test_tokens_beside_a_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "TURN_S", 0.01)
    monkeypatch.setattr(tasks, "STEPS", 2)
    found = tasks.tokens_over_bare("transformer", repeats=2)
    assert found.keys() == with_quartiles("tokens_transformer_seconds_over_bare")
    assert all(isinstance(value, float) and value > 0 for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_tables_building_is_measured_in_a_process_of_its_own(kind: str) -> None:
    for seconds, share in tasks.table_built(kind, rows=20_000, clients=100):
        assert 0 < seconds < 60
        assert share > 0.5


def test_parts_are_chosen_and_unknown_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PARTS", {"a": lambda n: {"a": n}, "b": lambda n: {"b": 1.0}})
    assert engine.results(["a", "a"], repeats=3) == {"a": 3}
    with pytest.raises(UserError, match="--only 'c': allowed: a, b, flower, app"):
        engine.results(["c"], repeats=3)


def test_a_table_puts_quartiles_behind_their_median() -> None:
    lines = markdown({"x": 0.5, "x_q1": 0.25, "x_q3": 0.75, "chosen": "bfloat16"}).splitlines()
    assert "torch" in lines[0]
    assert lines[-2:] == ["| x | 0.5 | 0.25 to 0.75 |", "| chosen | bfloat16 |  |"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["workers", "ray"])
def test_idle_workers(name: str) -> None:
    found = idle_shares(TINY, [name], repeats=2, warmup=1)
    assert found.keys() == with_quartiles(f"idle_share_{name}")
    assert all(0 < value < 1 for value in found.values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flowers_own_simulation_runs_the_same_apps() -> None:
    with spread(Bare.of(TINY), 2) as limit:
        measured = flower.beside(TINY.on("flower"), {"limit2": limit}, repeats=2)
    assert {name: len(m.seconds) for name, m in measured.items()} == {"limit2": 2, "flower": 2}


@pytest.mark.slow
def test_the_same_app_in_flowers_simulation_and_here() -> None:
    found = apps.beside_flower(2, clients=2, sizes={"tiny": (10, "inline")})
    parts = ("app_tiny_flower_s_per_round", "app_tiny_inline_s_per_round")
    assert found.keys() == {"app_tiny_inline_over_flower"} | set().union(*map(with_quartiles, parts))
    assert all(isinstance(value, float) and value > 0 for value in found.values())
