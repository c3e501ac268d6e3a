"""The workers engine, real: bit-identical to inline for any number of processes, and it recovers from killed ones."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from federation import TINY, run_tiny, tiny

from fl_sim import Experiment, Report, load, local_sgd, run, snapshot
from fl_sim.session import Silent
from fl_sim.simulation import resume
from fl_sim.types import ClientContext, Task, Update

CLOCK = {"seconds"}


def same(a: Report, b: Report) -> None:
    assert a.summary["params_sha256"] == b.summary["params_sha256"]
    assert a.ledger.to_table().equals(b.ledger.to_table())
    untimed = [[{k: v for k, v in row.items() if k not in CLOCK} for row in r.rounds] for r in (a, b)]
    assert untimed[0] == untimed[1]


METHODS = {
    "dense": [],
    "topk": [
        "client.target=clients.presets:topk",
        "client.density=0.1",
        "wire.error_feedback=true",
        "wire.uplink.values=int8",
        "rounds=3",
    ],
    "local_statistics": ["model.trainable=batchnorm", "model.statistics=local", "evaluate.clients=2"],
    "masked": ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2", "rounds=3"],
}


@pytest.mark.parametrize(
    ("method", "counts"), [("dense", (1, 2)), ("topk", (2,)), ("local_statistics", (2,)), ("masked", (2,))]
)
def test_same_as_inline_for_any_number_of_processes(tmp_path: Path, method: str, counts: tuple[int, ...]) -> None:
    inline = run_tiny(tmp_path / "inline", *METHODS[method])
    for count in counts:
        options = [*METHODS[method], "engine=workers", f"workers.count={count}"]
        same(inline, run_tiny(tmp_path / str(count), *options))


def suicidal(task: Task, ctx: ClientContext) -> Update:
    """One partition kills its process in round 2, as an out-of-memory killer would."""
    if task.round == 2 and ctx.num_examples == task.config["victim"]:
        os.kill(os.getpid(), signal.SIGKILL)
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples)


def sleepy(task: Task, ctx: ClientContext) -> Update:
    """One partition never answers in round 2."""
    if task.round == 2 and ctx.num_examples == task.config["victim"]:
        time.sleep(3600)
    return Update(dict(task.params), ctx.num_examples)


@pytest.mark.parametrize(
    ("client", "kind", "options"), [("suicidal", "lost", []), ("sleepy", "late", ["faults.timeout_s=1"])]
)
def test_a_killed_or_hanging_client_costs_one_update_and_its_process_comes_back(
    tmp_path: Path, client: str, kind: str, options: list[str]
) -> None:
    tree = {**TINY, "client": {"target": f"{__name__}:{client}", "victim": 118}, "cohort": {"size": 6}, "rounds": 3}
    report = run(Experiment.from_tree(tree, [f'out="{tmp_path}"', "engine=workers", "workers.count=2", *options]))
    assert [row["clients"] for row in report.rounds] == [6, 5, 6]
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0} | {kind: 1}
    assert report.ledger.messages(phase="train") == {"down": 18, "up": 17}


def test_resumed_on_workers_as_if_never_stopped_inline(tmp_path: Path) -> None:
    """What clients keep comes back to processes that never saw it."""
    options = METHODS["topk"]

    class Stop(Silent):
        def round(self, row: Mapping[str, float]) -> None:
            if row["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path / "workers", *options, "engine=workers", "workers.count=2"), Stop())
    same(
        run_tiny(tmp_path / "whole", *options),
        resume(tiny(tmp_path / "workers", *options, "engine=workers", "workers.count=1")),
    )
