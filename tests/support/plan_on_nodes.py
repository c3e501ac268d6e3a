"""Hold `fl-sim plan` against clusters of 1, 2 and 3 network namespaces, one worker each. Takes minutes; run it on an idle machine.

    PYTHONPATH=.:tests/support python tests/support/plan_on_nodes.py compute      # or link, or driver, or a config

The nodes share this machine's processors, so that the clients of "compute" wait for a fixed time and do not work.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray_nodes import Nodes, cluster, until

from fl_sim.core.types import Task, Update
from fl_sim.training.client import ClientContext

ROUNDS, COUNTED_FROM = 6, 2
"""Of a measured run; its first rounds warm up."""
WAIT_S = 1.0
DIGITS = 'rounds = 100\n[data]\nsource = "digits"\nclients = 60\n[model]\nname = "{model}"\n[cohort]\nsize = {cohort}\n'
WORKLOADS: Mapping[str, tuple[str, float]] = {
    "compute": ('client = "plan_on_nodes:waiting"\n' + DIGITS.format(model="cnn_bn", cohort=12), 1000.0),
    "link": ('client = "fl_sim.bench.workloads:nudge"\n' + DIGITS.format(model="resnet32", cohort=12), 20.0),
    "driver": ('client = "fl_sim.bench.workloads:echo"\n' + DIGITS.format(model="resnet32", cohort=48), 1000.0),
}
"""Name -> (config, Mbit/s of every link)."""


def waiting(task: Task, ctx: ClientContext) -> Update:
    """A client that waits and returns what it received."""
    time.sleep(WAIT_S)
    return Update(task.params, ctx.num_examples)


def planned(config: Path, mbps: float) -> Mapping[str, list[Mapping[str, float]]]:
    command = [sys.executable, "-m", "fl_sim.cli", "plan", str(config), "--nodes", "1,2,3", "--workers", "1"]
    done = subprocess.run([*command, "--mbps", str(mbps), "--json"], check=True, stdout=subprocess.PIPE, text=True)
    found: Mapping[str, list[Mapping[str, float]]] = json.loads(done.stdout)
    return found


def measured(config: Path, count: int, mbps: float, place: Path) -> tuple[float, float, float, float]:
    """Seconds of a round (median), bytes out of the head and into it a round, peak bytes of a worker."""
    out = place / f"runs{count}"
    with cluster(count) as nodes:
        for node in range(count if mbps < 1000 else 0):
            nodes.slow(node, f"{mbps:g}mbit")
        program = nodes.run(0, config, f'out="{out}"', f"rounds={ROUNDS}")
        until(lambda: len(rows(out)) >= COUNTED_FROM, seconds=900, what="rounds")
        first, before = len(rows(out)), nodes.moved(0)
        until(lambda: len(rows(out)) == ROUNDS, seconds=900, what="rounds")
        after, peak = nodes.moved(0), peak_bytes(nodes, count - 1)
        nodes.ended(program)
    into, away = ((b - a) / (ROUNDS - first) for a, b in zip(before, after, strict=True))
    return statistics.median(row["seconds"] for row in rows(out)[COUNTED_FROM:]), away, into, peak


def rows(out: Path) -> Sequence[Mapping[str, float]]:
    files = list(out.glob("*/rounds.jsonl"))
    return [json.loads(line) for line in files[0].read_text().splitlines()] if files else []


def peak_bytes(nodes: Nodes, node: int) -> float:
    """Of the node's worker that takes most; 0 once they have ended."""
    peaks = [0]
    for pid in nodes.pids(node):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::Worker"):
                peaks += [1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        except OSError:
            continue
    return max(peaks)


def main(name: str) -> None:
    text, mbps = WORKLOADS[name] if name in WORKLOADS else (Path(name).read_text(), 1000.0)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(text)
        plan = planned(config, mbps)
        worker = plan["memory"][0]["node_bytes"]
        print("workload nodes bound | s: measured planned error | MB out of head | MB into it | MB of a worker")
        for round_ in plan["rounds"]:
            count = int(round_["nodes"])
            seconds, away, into, peak = measured(config, count, mbps, Path(folder))
            pairs = ((away, round_["head_down"]), (into, round_["head_up"]), (peak, worker))
            moved = " | ".join(f"{a / 1e6:.2f} {b / 1e6:.2f} {_error(a, b)}" for a, b in pairs)
            error = _error(seconds, round_["seconds"])
            print(f"{name} {count} {round_['bound']} | {seconds:.3f} {round_['seconds']:.3f} {error} | {moved}")


def _error(measured: float, planned: float) -> str:
    return f"{100 * (planned / measured - 1):+.0f} %" if measured else "-"


if __name__ == "__main__":
    main(sys.argv[1])
