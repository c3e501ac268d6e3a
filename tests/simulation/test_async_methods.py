"""Federations without rounds whose methods send extra tensors, sparse broadcasts or codes, have several models, or ask clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import FOUR, TINY, same
from interruption import KillAfter, Killed

from fl_sim import Experiment, Report, run
from strategies import flights

SMALL = {
    **TINY,
    "rounds": 5,
    "data": {"source": "digits", "clients": 12, "partition": "dirichlet", "alpha": 0.5},
    "model": {"name": "mlp", "width": 0.25},
    "training": {"lr": 0.1, "steps": 2, "batch_size": 16},
    "network": {"links": {"3G": 1, "4G": 1}, "speed_spread": 1.0},
}
FEDBUFF = ("schedule.kind=fedbuff", "schedule.buffer=3", "schedule.concurrency=6", "network.dropout=0.1")
KINDS: dict[str, tuple[str, ...]] = {
    "extra tensors": (
        "client=clients.presets:scaffold",
        "strategy=strategies.presets:scaffold",
        "wire.broadcast.density=0.3",
        "wire.uplink.values=int8",
        "wire.uplink.content=difference",
    ),
    "masks both ways": (
        "strategy=strategies.presets:gradual_magnitude",
        "strategy.density=0.2",
        "strategy.end=4",
        "client=clients.presets:topk",
        "client.density=0.5",
        "wire.error_feedback=true",
        "wire.uplink.content=difference",
        "wire.broadcast={density=0.2, values='float16'}",
    ),
    "capacities": (
        "capacities=[{name='mlp', width=0.1, share=0.5}]",
        "data.noise=16",
        "strategy=strategies.presets:mixed_capacities",
        "strategy.steps=2",
        "client=clients.presets:ditto",
        "client.personal_steps=2",
        "evaluate.clients=2",
    ),
    "codecs": (
        "wire.codec={uplink='powersgd', downlink='powersgd'}",
        "wire.broadcast.density=1.0",
        "wire.uplink.content=difference",
        "wire.error_feedback=true",
    ),
    "power of choice": ("strategy=strategies.presets:power_of_choice", "strategy.candidates=6"),
}


def experiment(out: Path, kind: str, *overrides: str) -> Experiment:
    return Experiment.from_tree(SMALL, [f'out="{out}"', *KINDS[kind], *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    return cache(lambda kind: run(experiment(tmp_path_factory.mktemp("whole"), kind, *FEDBUFF), quiet=True))


@pytest.mark.parametrize("kind", KINDS)
def test_without_staleness_a_step_is_a_round_bit_for_bit(kind: str, tmp_path: Path) -> None:
    rounds = run(experiment(tmp_path, kind, *FOUR, "rounds=3"), quiet=True)
    every = (*FOUR, "schedule.kind=fedbuff", "schedule.buffer=4", "schedule.max_staleness=0", "rounds=3")
    steps = run(experiment(tmp_path, kind, *every), quiet=True)
    assert rounds.summary["params_sha256"] == steps.summary["params_sha256"]
    assert all(torch.equal(rounds.params[name], steps.params[name]) for name in rounds.params)
    # A round books model by model, a step what it sends and then what it takes: of several models the order differs.
    first, second = (report.ledger.to_table().to_pylist() for report in (rounds, steps))
    assert first == second or (kind == "capacities" and sorted(map(str, first)) == sorted(map(str, second)))
    added = {"seconds", "staleness", "staleness_max", "stale_masks", "in_flight"}
    for row, step in zip(rounds.rounds, steps.rounds, strict=True):
        assert {k: v for k, v in row.items() if k not in added} == {k: v for k, v in step.items() if k not in added}


@pytest.mark.parametrize("kind", KINDS)
def test_stale_updates_are_used_and_every_byte_is_booked(kind: str, whole: Callable[[str], Report]) -> None:
    report = whole(kind)
    assert max(row["staleness_max"] for row in report.rounds) > 0
    assert [row["simulated_s"] for row in report.rounds] == sorted(row["simulated_s"] for row in report.rounds)
    assert {kind: n for kind, n in report.summary["failures"].items() if kind != "lost"} == {
        "raised": 0,
        "rejected": 0,
        "late": 0,
    }
    booked = report.ledger.total(by=("direction", "phase", "section"))
    if kind == "extra tensors":
        rows = report.ledger.total(by=("round", "client"), where={"direction": "up", "section": "extra/control"})
        assert len(rows) == report.ledger.messages(phase="train")["up"]
        assert min(rows.values()) > 0
        assert report.results.total_bytes == sum(booked.values()) == sum(report.flows.parts.values())
    if kind == "masks both ways":
        assert sum(row["stale_masks"] for row in report.rounds) > 0
    if kind == "capacities":
        assert all("clients_accuracy" in row for row in report.rounds)
        assert booked["down", "evaluate", "values"] > 0
    if kind == "codecs":
        assert booked["down", "train", "codec"] > 0
    if kind == "power of choice":
        assert booked["down", "query", "values"] > 0


def test_nobody_who_is_on_the_way_is_asked_to_evaluate(tmp_path: Path) -> None:
    """Of twelve clients six train at a time, and six evaluate."""
    ditto = ("client=clients.presets:ditto", "client.personal_steps=1", "evaluate.clients=6", "network.dropout=0")
    keys = [f'out="{tmp_path}"', *FEDBUFF[:3], *ditto]
    report = run(Experiment.from_tree(SMALL, keys), quiet=True)
    under_way: Counter[int] = Counter()
    asked = 0
    for row in report.ledger.to_table().to_pylist():
        if row["section"] != "header":
            continue
        if row["phase"] == "train":
            under_way[row["client"]] += 1 if row["direction"] == "down" else -1
        elif row["direction"] == "down":
            asked += 1
            assert under_way[row["client"]] == 0
    assert asked == 6 * 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_bit_for_bit(kind: str, whole: Callable[[str], Report], tmp_path: Path) -> None:
    after, replies = np.random.default_rng(list(kind.encode())).integers((1, 0), (5, 3)).tolist()
    asked = experiment(tmp_path, kind, *FEDBUFF)
    with pytest.raises(Killed):
        run(asked, KillAfter(after, replies))
    same(run(asked, resume=True, quiet=True), whole(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_change_nothing(kind: str, whole: Callable[[str], Report], tmp_path: Path) -> None:
    same(run(experiment(tmp_path, kind, *FEDBUFF, "checkpoint.every=0"), quiet=True), whole(kind))


WORKERS = [
    ("extra tensors", 2),
    ("capacities", 3),
    *(pytest.param(kind, count, marks=pytest.mark.slow) for kind in KINDS for count in (1, 2, 3)),
]


@pytest.mark.parametrize(("kind", "workers"), WORKERS)
def test_any_number_of_workers_gives_the_same(
    kind: str, workers: int, whole: Callable[[str], Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However early they are handed their clients."""
    monkeypatch.setattr(flights, "AHEAD", workers)
    asked = experiment(tmp_path, kind, *FEDBUFF, "engine=workers", f"workers.count={workers}")
    same(run(asked, quiet=True), whole(kind))
