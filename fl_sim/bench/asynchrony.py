"""Asynchronous federations of clients that do nothing: what the event queue, the codecs and the ledger cost an update."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence

import xxhash

from fl_sim.bench.contest import Flat
from fl_sim.bench.workloads import ECHO, Workload
from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.core.observer import SILENT
from fl_sim.simulation.loop import run

MODEL = Workload("cnn", clients=10_000, cohort=1000, width=0.178, client=ECHO)
"""10,000 clients of five samples each, 50,624 parameters."""


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


def measure(engines: Sequence[str], *, updates: int, buffer: int, concurrency: int) -> Iterator[Flat]:
    """For each engine, such as "inline" or "workers:2": seconds, and hashes of what must be the same on all."""
    for asked in engines:
        engine, _, count = asked.partition(":")
        with tempfile.TemporaryDirectory() as out:
            experiment = federation(
                engine, updates=updates, buffer=buffer, concurrency=concurrency, workers=int(count or 1), out=out
            )
            started = time.perf_counter()
            report = run(experiment, SILENT)
            wall_s = time.perf_counter() - started
            rounds_s = sum(row["seconds"] for row in report.rounds)
            yield {
                "engine": asked,
                "updates": sum(int(row["clients"]) for row in report.rounds),
                "seconds": round(wall_s, 1),
                "updates_per_s": round(updates / rounds_s, 1),
                "staleness_mean": round(sum(row["staleness"] for row in report.rounds) / len(report.rounds), 3),
                "simulated_s": float(report.rounds[-1]["simulated_s"]),
                "params": report.results.params_sha256[:16],
                "ledger": _hash(report.ledger),
            }


def _hash(ledger: Ledger) -> str:
    digest = xxhash.xxh3_64()
    for block in ledger.blocks():
        digest.update(block.tobytes())
    return digest.hexdigest()
