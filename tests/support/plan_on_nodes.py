"""Hold `fl-sim plan` against clusters of 1, 2 and 3 network namespaces, one worker each. Takes minutes; run it on an idle machine.

    PYTHONPATH=.:tests/support python tests/support/plan_on_nodes.py compute      # or link, driver, fold_..., or a config
    PYTHONPATH=.:tests/support python tests/support/plan_on_nodes.py fold_compute here      # one machine, 1 and 2 workers

The nodes share this machine's processors, so that the clients of "compute" wait for a fixed time and do not work. In the rounds of
"fold_..." workers add up updates.
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

from fl_sim.bench.cluster_model import Cluster, Costs, round_on
from fl_sim.core.types import Task, Update
from fl_sim.training.client import ClientContext

ROUNDS, COUNTED_FROM = 6, 2
"""Of a measured run; its first rounds warm up."""


def _digits(client: str, model: str, cohort: int) -> str:
    data = f'[data]\nsource = "digits"\npartition = "iid"\nclients = {max(60, cohort)}\n'
    evaluated = "[evaluate]\nevery = 100\n"  # after none of the rounds that are measured
    return f'rounds = 100\n{data}{evaluated}[model]\nname = "{model}"\n[cohort]\nsize = {cohort}\n[client]\n{client}\n'


def _waiting(seconds: float) -> str:
    return f'target = "plan_on_nodes:waiting"\nseconds = {seconds}'


NUDGE, ECHO = ('target = "fl_sim.bench.workloads:nudge"', 'target = "fl_sim.bench.workloads:echo"')
WORKLOADS: Mapping[str, tuple[str, float]] = {
    "compute": (_digits(_waiting(1.0), "cnn_bn", 12), 1000.0),
    "link": (_digits(NUDGE, "resnet32", 12), 20.0),
    "driver": (_digits(ECHO, "resnet32", 48), 1000.0),
    "fold_compute": (_digits(_waiting(0.02), "cnn_bn", 256), 1000.0),
    "fold_link": (_digits(NUDGE, "resnet32", 256), 50.0),
    "fold_driver": (_digits(ECHO, "resnet32", 256), 1000.0),
}
"""Name -> (config, Mbit/s of every link)."""


def waiting(task: Task, ctx: ClientContext) -> Update:
    """A client that waits and returns what it received."""
    time.sleep(float(task.config["seconds"]))
    return Update(task.params, ctx.num_examples)


def planned(config: Path) -> tuple[Costs, int]:
    """What the short run measured, and the clients of a round."""
    command = [sys.executable, "-m", "fl_sim.cli", "plan", str(config), "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(found["measured"]["costs"])
    return Costs(**found["measured"]["costs"]), found["cohort"]


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


def on_this_machine(config: Path, workers: int, place: Path) -> float:
    """Seconds of a round (median) with so many Ray workers, without namespaces."""
    out = place / f"here{workers}"
    options = ["engine=ray", f"ray.workers={workers}", f'out="{out}"', f"rounds={ROUNDS}"]
    subprocess.run(
        [sys.executable, "-m", "fl_sim.cli", "run", str(config), *options], check=True, stdout=subprocess.PIPE
    )
    return statistics.median(row["seconds"] for row in rows(out)[COUNTED_FROM:])


def main(name: str, where: str = "nodes") -> None:
    text, mbps = WORKLOADS[name] if name in WORKLOADS else (Path(name).read_text(), 1000.0)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(text)
        if where == "here":
            _here(name, config, Path(folder))
        else:
            _nodes(name, config, mbps, Path(folder))


def _here(name: str, config: Path, folder: Path) -> None:
    costs, cohort = planned(config)
    print("workload workers bound | s: measured planned error")
    for workers in (1, 2):
        round_ = round_on(costs, Cluster(1, workers, 1000.0), cohort)
        pair = on_this_machine(config, workers, folder), round_.seconds
        print(f"{name} {workers} {round_.bound} | {pair[0]:.3f} {pair[1]:.3f} {_error(*pair)}", flush=True)


def _nodes(name: str, config: Path, mbps: float, folder: Path) -> None:
    costs, cohort = planned(config)
    print("workload nodes bound | s: measured planned error | MB out of head | MB into it | MB of a worker")
    for count in (1, 2, 3):
        round_ = round_on(costs, Cluster(count, 1, mbps), cohort)
        seconds, away, into, peak = measured(config, count, mbps, folder)
        pairs = ((away, round_.head_down), (into, round_.head_up), (peak, costs.worker_bytes))
        moved = " | ".join(f"{a / 1e6:.2f} {b / 1e6:.2f} {_error(a, b)}" for a, b in pairs)
        error = _error(seconds, round_.seconds)
        print(f"{name} {count} {round_.bound} | {seconds:.3f} {round_.seconds:.3f} {error} | {moved}", flush=True)


def _error(measured: float, planned: float) -> str:
    return f"{100 * (planned / measured - 1):+.0f} %" if measured else "-"


if __name__ == "__main__":
    main(*sys.argv[1:])
