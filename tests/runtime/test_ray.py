"""The Ray engine, real: bit-identical to inline for any number of workers, and it recovers from killed workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import ray
from federation import TINY, run_tiny, same, tiny

from fl_sim import Experiment, Report, run
from fl_sim.core.observer import Silent
from fl_sim.core.types import Task, Update
from fl_sim.simulation import resume
from fl_sim.training.client import ClientContext


@pytest.fixture(scope="module", autouse=True)
def _one_cluster() -> Iterator[None]:
    """Runs join a started Ray, which saves its start for each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


METHODS = {
    "dense": [],
    "topk": [
        "client.target=clients.presets:topk",
        "client.density=0.1",
        "wire.error_feedback=true",
        "wire.uplink.values=int8",
        "wire.uplink.content=difference",
        "wire.broadcast.density=0.1",
        "wire.broadcast.values=int8",
        "rounds=3",
    ],
    "features": ["client.target=clients.presets:feature_distillation", 'client.stages=["2", "5", "8"]', "rounds=3"],
    "taught": [
        "strategy.target=strategies.presets:fedavg",
        'strategy.distil.teacher="ensemble"',
        "strategy.distil.steps=5",
        "data.proxy=0.1",
    ],
    "adaptive": ["client.target=clients.presets:adaptive_pruning", "gating.macs_budget=0.5"],
    "batchnorm": ["model.name=resnet20", "model.trainable=batchnorm", "training.steps=2"],
    "local_statistics": ["model.trainable=batchnorm", "model.statistics=local", "evaluate.clients=2"],
    "capacities": [
        "model.name=resnet8",
        "model.width=0.25",
        'capacities=[{name = "resnet8", width = 0.125}]',
        "strategy.target=strategies.presets:mixed_capacities",
        "strategy.steps=5",
        "data.proxy=0.1",
    ],
    "masked": ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2", "rounds=3"],
}


SLOW = {"dense", "features", "taught", "batchnorm", "capacities"}
"""An actor takes seconds to start: of methods that keep state alike, one runs by default."""


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in METHODS]
)
def test_same_parameters_and_ledger_as_inline(tmp_path: Path, method: str) -> None:
    inline = run_tiny(tmp_path / "inline", *METHODS[method])
    workers = 2 if method == "topk" else 1  # of which each keeps what its clients were sent
    same(inline, run_tiny(tmp_path / "ray", *METHODS[method], "engine=ray", f"ray.workers={workers}"))


@pytest.mark.parametrize(
    "options",
    [pytest.param(("ray.workers=1",), marks=pytest.mark.slow), ("ray.workers=2", "ray.clients_per_task=3")],
)
def test_neither_the_number_of_workers_nor_clients_per_task_matter(
    tmp_path: Path, finished: Callable[..., Report], options: tuple[str, ...]
) -> None:
    same(finished(), run_tiny(tmp_path, "engine=ray", *options))


def fatal(task: Task, ctx: ClientContext) -> Update:
    """One partition kills its worker process in round 2, as an out-of-memory killer would, and never answers in another."""
    if ctx.num_examples == task.config["victim"]:
        if task.round == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if task.round == task.config["hangs"]:
            time.sleep(3600)
    return Update(dict(task.params), ctx.num_examples)


@pytest.mark.parametrize(
    ("per_task", "hangs"),
    [pytest.param(1, 3, marks=pytest.mark.slow), pytest.param(3, 3, marks=pytest.mark.slow), (3, 0)],
)
def test_a_client_that_kills_its_worker_or_hangs_costs_one_update_and_later_rounds_use_all(
    tmp_path: Path, per_task: int, hangs: int
) -> None:
    """The others of its task, which wait behind it, are computed again."""
    client = {"target": f"{__name__}:fatal", "victim": 118, "hangs": hangs}
    tree = {**TINY, "client": client, "cohort": {"size": 6}, "rounds": 4 if hangs else 3}
    options = [
        "engine=ray",
        "ray.workers=2",
        f"ray.clients_per_task={per_task}",
        *(["faults.timeout_s=1"] if hangs else []),
    ]
    report = run(Experiment.from_tree(tree, [f'out="{tmp_path}"', *options]))
    late = int(hangs > 0)
    assert [row["clients"] for row in report.rounds] == ([6, 5, 5, 6] if hangs else [6, 5, 6])
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": late, "lost": 1}
    sent = 6 * len(report.rounds)
    assert report.ledger.messages(phase="train") == {"down": sent, "up": sent - 1 - late}


def test_resumed_on_ray_as_if_never_stopped_inline(tmp_path: Path) -> None:
    """What clients keep comes back to workers that never saw it."""
    options = METHODS["topk"]
    whole = run_tiny(tmp_path / "whole", *options)

    class Stop(Silent):
        def round(self, row: Mapping[str, float]) -> None:
            if row["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path / "ray", *options, "engine=ray", "ray.workers=1"), Stop())
    same(whole, resume(tiny(tmp_path / "ray", *options, "engine=ray", "ray.workers=1")))
