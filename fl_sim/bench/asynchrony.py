"""Asynchronous federations of clients that do next to nothing: what event queue, codecs and ledger cost an update."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from fl_sim.bench.workloads import NUDGE, Workload
from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.core.observer import SILENT
from fl_sim.simulation.loop import run

MODEL = Workload("cnn", clients=10_000, cohort=1000, width=0.178, client=NUDGE)
"""10,000 clients of five samples each, 50,624 parameters."""


@dataclass(frozen=True)
class Measured:
    """One engine: seconds of the whole run and updates a second of its steps; the rest is the same on all engines."""

    engine: str
    seconds: float
    updates_per_s: float
    updates: int
    staleness: float
    simulated_s: float
    params: str
    ledger: str

    @property
    def result(self) -> tuple[object, ...]:
        """What engines must agree on."""
        return self.updates, self.staleness, self.simulated_s, self.params, self.ledger


def federation(engine: str, *, updates: int, buffer: int, concurrency: int, workers: int, out: str) -> Experiment:
    """FedBuff over links and devices that differ."""
    given = MODEL.on(engine, workers=workers).model_dump(mode="json", exclude_defaults=True)
    given |= {
        "name": "bench-async",
        "out": out,
        "rounds": max(1, updates // buffer),
        "network": {"links": {"3G": 1, "4G": 2, "Wi-Fi": 3}, "speed_spread": 2.0},
        "schedule": {"kind": "fedbuff", "buffer": buffer, "concurrency": concurrency},
        "evaluate": {"every": 1_000_000},
        "checkpoint": {"every": 0},
    }
    return Experiment.from_tree(given)


def measure(engines: Sequence[str], *, updates: int, buffer: int, concurrency: int) -> Iterator[Measured]:
    """Run the federation on each engine, such as "inline" or "workers:2"."""
    for asked in engines:
        engine, _, count = asked.partition(":")
        with tempfile.TemporaryDirectory() as out:
            experiment = federation(
                engine, updates=updates, buffer=buffer, concurrency=concurrency, workers=int(count or 1), out=out
            )
            started = time.perf_counter()
            report = run(experiment, SILENT)
            seconds = time.perf_counter() - started
            done = sum(int(row["clients"]) for row in report.rounds)
            yield Measured(
                engine=asked,
                seconds=round(seconds, 1),
                updates_per_s=round(done / sum(row["seconds"] for row in report.rounds), 1),
                updates=done,
                staleness=round(sum(row["staleness"] for row in report.rounds) / len(report.rounds), 6),
                simulated_s=float(report.rounds[-1]["simulated_s"]),
                params=report.results.params_sha256[:16],
                ledger=_hash(report.ledger),
            )


def require_equal(rows: Sequence[Measured]) -> None:
    """Complain of an engine whose result differs from the first one's.

    Raises:
        RuntimeError: names the engine.
    """
    for row in rows[1:]:
        if row.result != rows[0].result:
            raise RuntimeError(f"{row.engine} gave {row.result}, {rows[0].engine} gave {rows[0].result}")


def _hash(ledger: Ledger) -> str:
    digest = xxhash.xxh3_64()
    for block in ledger.blocks():
        digest.update(block.tobytes())
    return digest.hexdigest()
