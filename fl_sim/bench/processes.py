"""Start-up time and peak memory, each measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = """
name = "startup"
rounds = 2
[data]
source = "digits"
[cohort]
size = 4
[ray]
workers = 2
[workers]
count = 2
"""


def first_round_s(engine: str) -> float:
    """Seconds from starting `fl-sim run` on digits to the first line of rounds.jsonl."""
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "config.toml"
        config.write_text(START)
        command = [
            sys.executable,
            "-m",
            "fl_sim.cli.app",
            "run",
            str(config),
            "--engine",
            engine,
            "--out",
            place,
            "--quiet",
        ]
        start = time.perf_counter()
        with subprocess.Popen(command) as process:
            while process.poll() is None and not any(f.stat().st_size for f in Path(place).glob("*/rounds.jsonl")):
                time.sleep(0.02)
            spent = time.perf_counter() - start
            process.wait()
        return spent


def peak_memory_mb() -> float:
    """MB (10^6 bytes) above the imports of a round of 300 clients with 466,906 parameters, inline."""
    done = subprocess.run([sys.executable, "-m", "fl_sim.bench.processes"], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def _measure() -> float:
    from fl_sim.bench import workloads
    from fl_sim.bench.contest import rounds
    from fl_sim.simulation.engines import open_grid
    from fl_sim.simulation.federation import Federation

    before = status_kb("VmRSS")
    experiment = workloads.no_op("inline", data="small_shape", cohort=300)
    federation = Federation.build(experiment)
    with open_grid(federation) as grid:
        one_round = rounds(federation, grid)
        one_round()
        one_round()
    return (status_kb("VmHWM") - before) * 1024 / 1e6


def status_kb(field: str) -> int:
    """Read a field of /proc/self/status, in kB. getrusage's peak would include that of the parent process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure()))
