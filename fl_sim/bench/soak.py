"""Long runs of a tiny model: does memory stay flat, and is anything left behind when a run is over?

Each engine runs in a process of its own, which samples itself and its children after every round, counts what it still
holds after `run` has returned, and is looked after by this one once it has ended. Linux only (`/proc`, `/dev/shm`).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fl_sim.bench import workloads
from fl_sim.config.experiment import Experiment
from fl_sim.core.observer import Silent
from fl_sim.core.types import UserError

SETTLE_S = 5.0
MARK = "FL_SIM_SOAK"
"""Environment variable that every process of a soak run inherits, whoever its parent is later."""
ENGINES = ("inline", "workers", "ray")


def _own_mb(process: int) -> float:
    """MB (10^6 bytes) that a process holds in memory and no file does; 0 when it is gone.

    Pages of files are the system's to take back, and those of libraries change owners as other processes come and go.
    """
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024 / 1e6


def _marked(mark: str) -> Iterator[int]:
    """Processes that carry a mark, this one excepted."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)
            except OSError:
                continue


def _title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@dataclass
class Sampler(Silent):
    """Looks at the driver's and the workers' memory after every round."""

    mark: str
    driver: list[float] = field(default_factory=list)
    workers: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def round(self, row: Mapping[str, float]) -> None:
        self.driver.append(_own_mb(os.getpid()))
        self.workers.append(sum(map(_own_mb, self._at_work())))
        self.seconds.append(row["seconds"])

    def _at_work(self) -> Iterator[int]:
        """Worker processes of any engine: our own children, and Ray's by their title."""
        yield from (child.pid for child in multiprocessing.active_children() if child.pid is not None)
        yield from (process for process in _marked(self.mark) if _title(process).startswith("ray::_Worker"))


def slope(values: Sequence[float]) -> float:
    """Growth in 100 rounds by least squares, after the first third, which warms up."""
    kept = values[len(values) // 3 :]
    if len(kept) < 2:
        return 0.0
    return 100 * statistics.linear_regression(range(len(kept)), kept).slope


def _experiment(engine: str, out: str, *, rounds: int, clients: int, cohort: int, workers: int) -> Experiment:
    """A model of about a thousand parameters, trained; clients keep what their sparse uploads left out."""
    plain = workloads.many(engine, workers=workers).model_dump(mode="json", exclude_none=True)
    tree = {
        "out": out,
        "rounds": rounds,
        "client": {"target": "clients.presets:topk", "density": 0.1},
        "cohort": {"size": cohort},
        "data": {**plain["data"], "clients": clients},
        "wire": {"error_feedback": True},
        "evaluate": {"every": max(1, rounds // 10)},
    }
    return Experiment.from_tree({**plain, **tree})


def _open_files() -> list[str]:
    """Count this process's open files by target; sockets and pipes without their numbers."""
    held = []
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the scan's own
            held.append(re.sub(r":\[\d+\]$", "", os.readlink(entry.path)))
    return held


@dataclass(frozen=True)
class _Held:
    """Resources of a process while no run is in progress."""

    files: list[str]
    threads: int
    processes: int

    @classmethod
    def now(cls, mark: str) -> _Held:
        """Looks once what was killed has had the time to end."""
        processes, deadline = len(list(_marked(mark))), time.monotonic() + SETTLE_S
        while processes and time.monotonic() < deadline:
            time.sleep(0.1)
            processes = len(list(_marked(mark)))
        return cls(_open_files(), threading.active_count(), processes)


def _run(engine: str, sizes: Mapping[str, int], mark: str) -> dict[str, float]:
    """In the process of one engine."""
    from fl_sim.simulation.loop import run

    sampler = Sampler(mark)
    with tempfile.TemporaryDirectory() as place:
        # What stays once for ever (thread pools, Ray's client, the process that workers are forked off) is opened by a
        # first, short run.
        run(_experiment(engine, place, **{**sizes, "rounds": 1}), quiet=True)
        before = _Held.now(mark)
        run(_experiment(engine, place, **sizes), sampler)
        after = _Held.now(mark)
        for name, count in (Counter(after.files) - Counter(before.files)).items():
            sys.stderr.write(f"{engine}: left open {count} times: {name}\n")
        return {
            "driver_mb": sampler.driver[-1],
            "driver_mb_per_100_rounds": slope(sampler.driver),
            "workers_mb": sampler.workers[-1],
            "workers_mb_per_100_rounds": slope(sampler.workers),
            "round_ms": 1e3 * statistics.median(sampler.seconds),
            "open_files_left": len(after.files) - len(before.files),
            "threads_left": after.threads - before.threads,
            "processes_left": after.processes - before.processes,
        }


def results(
    engines: Sequence[str], *, rounds: int, clients: int, cohort: int, workers: int = 2
) -> Iterator[dict[str, float]]:
    """A flat table of numbers for each engine, as soon as it is done.

    Raises:
        UserError: an unknown engine, a cohort larger than the clients, or no Linux.
        RuntimeError: an engine's run failed; what went wrong it has said itself.
    """
    if unknown := set(engines) - set(ENGINES):
        raise UserError(f"--engines {', '.join(sorted(unknown))}: allowed: {', '.join(ENGINES)}")
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("fl-sim bench soak reads /proc: it runs on Linux only")
    sizes = {"rounds": rounds, "clients": clients, "cohort": cohort, "workers": workers}
    _experiment("inline", "runs", **sizes)
    for engine in engines:
        mark, shared = uuid.uuid4().hex, set(os.listdir("/dev/shm"))
        done = subprocess.run(
            [sys.executable, "-m", "fl_sim.bench.soak", engine, json.dumps(sizes), mark],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, MARK: mark},
        )
        if done.returncode:
            raise RuntimeError(f"bench soak: the run on {engine} ended with status {done.returncode}")
        flat = {f"{engine}_{name}": value for name, value in json.loads(done.stdout).items()}
        flat[f"{engine}_processes_left_after_exit"] = len(list(_marked(mark)))
        flat[f"{engine}_shared_memory_left"] = len(set(os.listdir("/dev/shm")) - shared)
        yield flat


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])))
