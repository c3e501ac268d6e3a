"""Scale: a million clients, and thousands a round; each in a fresh process.

Beside a data set of as many samples as clients, and above the imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from fl_sim.bench.contest import Flat
from fl_sim.bench.processes import status_kb
from fl_sim.bench.workloads import ECHO, LARGEST
from fl_sim.config.experiment import Experiment
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.data import Data
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.loop import run


def million_clients() -> Flat:
    """Seconds and MB to build a federation of 1,000,000 clients, and the same of a run of three rounds of ten."""
    with tempfile.TemporaryDirectory() as place:
        experiment = _many(1_000_000, 10, place)
        Federation.build(_many(1000, 10, place))  # imports
        before, start = status_kb("VmRSS"), time.perf_counter()
        federation = Federation.build(experiment)
        assert federation.world  # made when it is first asked for
        built_s, built_mb = time.perf_counter() - start, (status_kb("VmHWM") - before) * 1024 / 1e6
        del federation
        start = time.perf_counter()
        run(experiment, quiet=True)
        run_s, run_mb = time.perf_counter() - start, (status_kb("VmHWM") - before) * 1024 / 1e6
    return {"million_build_s": built_s, "million_build_mb": built_mb, "million_run_s": run_s, "million_run_mb": run_mb}


def thousands_a_round() -> Flat:
    """Seconds of a round of 5,000 of 100,000 clients that echo a tiny model; the best of three."""
    with tempfile.TemporaryDirectory() as place:
        report = run(_many(100_000, 5000, place), quiet=True)
    return {"round_of_5000_s": min(row["seconds"] for row in report.rounds)}


def thousands_with_feedback() -> Flat:
    """Seconds from one round's end to the next, checkpoint included, where 5,000 of 100,000 clients send the largest tenth of a
    change that they draw, with error feedback; the best of four."""
    with tempfile.TemporaryDirectory() as place:
        experiment, ends = _many(100_000, 5000, place, LARGEST, rounds=5, wire={"error_feedback": True}), _Ends()
        run(experiment, ends, quiet=True)
    return {"feedback_round_of_5000_s": min(end - start for start, end in pairwise(ends.at))}


@dataclass
class _Ends:
    """An observer that notes when rounds end."""

    at: list[float] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Ignore."""

    def reply(self, answered: int, cohort: int) -> None:
        """Ignore."""

    def round(self, row: Mapping[str, float]) -> None:
        self.at.append(time.perf_counter())


def _many(clients: int, cohort: int, place: str, client: str = ECHO, **more: object) -> Experiment:
    data = {"source": "fl_sim.bench.scale:tiny_samples", "clients": clients, "partition": "iid", "validation": 0.001}
    tree = {
        "name": "many",
        "out": place,
        "rounds": 3,
        "client": client,
        "data": data | {"min_size": 1},
        "model": {"name": "mlp", "width": 0.05},
        "cohort": {"size": cohort},
        "evaluate": {"every": 3},
    }
    return Experiment.from_tree(tree | more)


def tiny_samples() -> Data:
    """Four numbers and one of four classes, 1,010,000 times."""
    rng = numpy_generator(0, Purpose.DATA)
    inputs = rng.standard_normal((1_010_000, 4)).astype(np.float32)
    labels = rng.integers(0, 4, len(inputs), dtype=np.int64)
    return Data.of(inputs, labels, test_inputs=inputs[:100], test_targets=labels[:100], num_classes=4, validation=0.001)


def few_images() -> Data:
    """400 random images of CIFAR's shape, of which 100 are the test set too."""
    rng = numpy_generator(0, Purpose.DATA)
    images = rng.integers(0, 256, (400, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, len(images), dtype=np.int64)
    return Data.of(
        images, labels, test_inputs=images[:100], test_targets=labels[:100], num_classes=10, validation=0.025
    )


MEASURES: Mapping[str, Callable[[], Flat]] = {
    "million_clients": million_clients,
    "thousands_a_round": thousands_a_round,
    "thousands_with_feedback": thousands_with_feedback,
}


def results(repeats: int) -> Flat:
    """All of them, each in a process of its own, once."""
    flat: Flat = {}
    for name in MEASURES:
        command = [sys.executable, "-m", "fl_sim.bench.scale", name]
        flat |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return flat


if __name__ == "__main__":
    sys.stdout.write(json.dumps(MEASURES[sys.argv[1]]()))
