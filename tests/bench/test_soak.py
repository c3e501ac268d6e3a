"""Long runs: what the program holds does not grow with the rounds, and nothing is left behind."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import _lru_cache_wrapper
from multiprocessing import get_context
from pathlib import Path

import pytest

from fl_sim import Experiment, run
from fl_sim.bench import soak
from fl_sim.core.observer import Silent

MANY = {
    "rounds": 24,
    "data": {"clients": 50},
    "cohort": {"size": 20},
    "model": {"name": "mlp", "width": 0.25},
    "client": {"target": "clients.presets:topk"},
    "training": {"steps": 1},
    "evaluate": {"every": 24},
}


@dataclass
class Held(Silent):
    """Bytes that Python's objects of the later rounds take, seen twice."""

    rounds: int = 0
    seen: list[int] = field(default_factory=list)

    def round(self, row: Mapping[str, float]) -> None:
        self.rounds += 1
        if self.rounds == 4:
            tracemalloc.start()
        if self.rounds in (15, 23):
            empty_bounded_caches()
            gc.collect()
            self.seen.append(tracemalloc.get_traced_memory()[0])


def empty_bounded_caches() -> None:
    """They fill up for some hundred rounds, and then grow no more."""
    for each in gc.get_objects():
        if type(each) is _lru_cache_wrapper and each.cache_parameters()["maxsize"] is not None:
            each.cache_clear()


def growth(out: str) -> float:
    """Bytes that Python's objects grow by in a round."""
    held = Held()
    run(Experiment.from_tree({**MANY, "out": out}), held)
    first, last = held.seen
    return (last - first) / 8


def test_what_python_holds_grows_by_a_line_of_the_log_a_round(tmp_path: Path) -> None:
    """The ledger's rows of a round would be another 5 kB. In a process of its own: what other tests left grows too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        assert 0 < alone.submit(growth, str(tmp_path)).result() < 5_000


@pytest.mark.slow
@pytest.mark.parametrize("engine", soak.ENGINES)
def test_nothing_is_left_and_memory_is_flat(engine: str) -> None:
    # Memory moves in steps of some MB while it warms up: over 150 rounds they look like a slope of 6 MB, over 450 they do not.
    (found,) = soak.results([engine], rounds=450, clients=60, cohort=30)
    assert found[f"{engine}_driver_mb_per_100_rounds"] < 5
    assert found[f"{engine}_workers_mb_per_100_rounds"] < 5
    for name in ("threads_left", "processes_left", "processes_left_after_exit", "shared_memory_left"):
        assert found[f"{engine}_{name}"] == 0, name
    assert found[f"{engine}_open_files_left"] <= (3 if engine == "ray" else 0)  # Ray's own sockets
