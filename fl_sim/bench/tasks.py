"""Tokens and tables beside images: token batches against a bare loop, and the building of a large table's federation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_sim import models
from fl_sim.bench.contest import Flat, alternate, over, spread_of
from fl_sim.bench.processes import status_kb
from fl_sim.config.experiment import Experiment
from fl_sim.core.seeding import Purpose, generator, numpy_generator
from fl_sim.data import Split
from fl_sim.simulation.federation import Federation
from fl_sim.training.loop import Training
from fl_sim.training.tasks import TASKS

VOCABULARY, LENGTH, BATCH, STEPS = 64, 64, 16, 10
ROWS, FEATURES, CLIENTS = 1_000_000, 20, 10_000


def results(repeats: int) -> Flat:
    """Seconds of the training loop on tokens over those of a bare loop, and what a table of 1,000,000 rows takes to build."""
    torch.set_num_threads(1)
    flat: Flat = {}
    for name in ("transformer", "lstm"):
        flat |= tokens_over_bare(name, repeats=repeats)
    for kind in ("parquet", "csv"):
        built = [table_built(kind) for _ in range(3)]
        for number, name in enumerate(("first", "cached")):
            start = f"{kind}_1m_rows_10000_clients_{name}"
            flat |= spread_of(f"{start}_build_s", [each[number][0] for each in built])
            flat |= spread_of(f"{start}_memory_over_size", [each[number][1] for each in built])
    return flat


def tokens_over_bare(name: str, *, repeats: int) -> Flat:
    """Seconds of `Training.fit` over seconds of the same steps in bare PyTorch, on the same token batches; 1 = as fast."""
    rng = generator(0, Purpose.DATA)
    tokens = torch.randint(VOCABULARY, (STEPS * BATCH, LENGTH + 1), generator=rng)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    interface = models.Interface((LENGTH,), VOCABULARY, vocabulary=VOCABULARY, each_token=True)
    ours, bare = (models.build_for(name, interface) for _ in range(2))
    training, split = Training(lr=0.1, steps=STEPS, batch_size=BATCH), Split(inputs, targets)

    def fit() -> None:
        training.fit(ours, split, TASKS["next_token"], rng=generator(0, Purpose.CLIENT))

    measured = alternate({"fit": fit, "bare": bare_loop(bare, inputs, targets)}, repeats=repeats)
    return over(f"tokens_{name}_seconds_over_bare", measured["fit"], measured["bare"])


def bare_loop(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """A function that takes one SGD step on each batch, in the order of the data."""

    def run() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        for start in range(0, len(inputs), BATCH):
            optimizer.zero_grad()
            outputs = model(inputs[start : start + BATCH])
            functional.cross_entropy(outputs.flatten(0, 1), targets[start : start + BATCH].flatten()).backward()
            optimizer.step()

    return run


Built = tuple[float, float]
"""Seconds, and peak memory over the table's size."""


def table_built(kind: str = "parquet", rows: int = ROWS, clients: int = CLIENTS) -> list[Built]:
    """Build the federation of a table in a fresh process: first with nothing cached, then from the cache.

    The table's size is that of its features as float32 and its classes as int64. Counted is the peak of all memory of the
    process above what it had after the federation of a small table: that of the imports. Pages of mapped files count while
    they are in the process's memory; the build lets those of the table go that it has read.

    Args:
        kind: "parquet" or "csv".
        rows, clients: of the table; of the federation.
    """
    with tempfile.TemporaryDirectory() as place:
        path, small = (Path(place) / f"{name}.{kind}" for name in ("table", "small"))
        write_table(path, rows)
        write_table(small, 1000)
        command = [sys.executable, "-m", "fl_sim.bench.tasks", str(small), str(path), str(rows), str(clients)]
        own = {**os.environ, "FL_SIM_CACHE": str(Path(place) / "cache")}
        runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=own) for _ in range(2)]
    return [(float(seconds), float(share)) for seconds, share in (json.loads(done.stdout) for done in runs)]


def write_table(path: Path, rows: int) -> None:
    """Write a table of normal features and classes that depend on them, in the format of the path."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import csv

    rng = numpy_generator(0, Purpose.DATA)
    features = rng.standard_normal((FEATURES, rows), dtype=np.float32)
    columns = {f"x{number}": column for number, column in enumerate(features)}
    table = pa.table({**columns, "kind": (features[:4] > 0).sum(axis=0)})
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        pq.write_table(table, path)


def _measure(small: str, path: str, rows: int, clients: int) -> Built:
    _build(small, 10)  # what is imported for the first table is not the second one's
    before, start = status_kb("VmRSS"), time.perf_counter()
    _build(path, clients)
    seconds = time.perf_counter() - start
    return seconds, 1024 * (status_kb("VmHWM") - before) / (rows * (4 * FEATURES + 8))


def _build(path: str, clients: int) -> None:
    experiment = Experiment.from_tree(
        {
            "name": "bench-table",
            "data": {"source": path, "target": "kind", "clients": clients, "partition": "iid"},
            "model": {"name": "mlp"},
            "cohort": {"size": 10},
        }
    )
    Federation.build(experiment, quiet=True)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))))
