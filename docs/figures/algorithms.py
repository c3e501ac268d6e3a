"""Runs every algorithm on two tasks under three seeds and writes the tables of docs/algorithms.md.

    python docs/figures/algorithms.py runs/algorithms

`make algorithms` does that. A run that is finished is read and not run again; one that was stopped goes on.
"""

from __future__ import annotations

import datetime
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fl_sim import Experiment, Report, run
from fl_sim.bench.show import header
from fl_sim.simulation.earlier_runs import is_stopped

PAGE = Path(__file__).parents[1] / "algorithms.md"
SEEDS = (0, 1, 2)
DIGITS: Mapping[str, object] = {
    "rounds": 30,
    "data": {"source": "digits", "clients": 20, "partition": "dirichlet", "alpha": 0.1},
    "model": {"name": "cnn_bn"},
    "cohort": {"size": 5},
    "training": {"lr": 0.1, "epochs": 2, "batch_size": 32},
    "evaluate": {"every": 10},
}
TEXT: Mapping[str, object] = {
    "rounds": 12,
    "task": "next_token",
    "data": {"source": "coriolanus", "partition": "natural", "clients": 32},
    "model": {"name": "lstm"},
    "cohort": {"size": 8},
    "training": {"lr": 3.0, "steps": 8, "batch_size": 8},
    "evaluate": {"every": 12},
}
TASKS = {"digits": (DIGITS, "accuracy %"), "text": (TEXT, "perplexity")}
WORDS = {
    "digits": {"COHORT": "5", "UPDATES": "150", "SECONDS": "2"},
    "text": {"COHORT": "8", "UPDATES": "96", "SECONDS": "10"},
}
"""What a word of an option stands for: clients of a round, updates of a run, seconds between two steps."""
CLOCK = ("network.links={3G=1, 4G=1}", "network.speed_spread=1.0")
FEDBUFF = ("schedule.kind=fedbuff", "schedule.buffer=COHORT", "schedule.concurrency=10", *CLOCK)
CHANGES = "wire.uplink.content=difference"
METHODS: Mapping[str, Sequence[str]] = {
    "FedAvg": (),
    "FedAvgM": ("strategy=strategies.presets:fedavgm", "strategy.momentum=0.5"),
    "FedAdagrad": ("strategy=strategies.presets:fedadagrad", "strategy.lr=0.03"),
    "FedAdam": ("strategy=strategies.presets:fedadam", "strategy.lr=0.03"),
    "FedYogi": ("strategy=strategies.presets:fedyogi", "strategy.lr=0.03"),
    "FedProx": ("client=clients.presets:fedprox", "client.mu=0.01"),
    "MOON": ("client=clients.presets:moon",),
    "SCAFFOLD, option I": (
        "client=clients.presets:scaffold",
        "client.option=1",
        "strategy=strategies.presets:scaffold",
    ),
    "SCAFFOLD, option II": ("client=clients.presets:scaffold", "strategy=strategies.presets:scaffold"),
    "FedDyn": ("client=clients.presets:feddyn", "strategy=strategies.presets:feddyn", "strategy.alpha=0.1"),
    "FedNova": ("client=clients.presets:fednova", "strategy=strategies.presets:fednova"),
    "q-FedAvg": ("client=clients.presets:qfedavg", "strategy=strategies.presets:qfedavg", "strategy.q=1.0"),
    "FedAvg, clients by size": ("strategy.select=by_size", "strategy.aggregate=equal"),
    "FedAvg, power-of-choice": ("strategy=strategies.presets:power_of_choice", "strategy.candidates=10"),
    "FedBuff": FEDBUFF,
    "FedAsync": ("schedule.kind=fedasync", "rounds=UPDATES", "evaluate.every=UPDATES", *CLOCK),
    "a step every SECONDS s": ("schedule.kind=deadline", "network.deadline_s=SECONDS", *CLOCK),
    "SCAFFOLD under FedBuff": (
        "client=clients.presets:scaffold",
        "strategy=strategies.presets:scaffold",
        *FEDBUFF,
    ),
    "signSGD with majority vote": (
        "strategy=strategies.presets:signsgd",
        "strategy.lr=0.003",
        CHANGES,
        "wire.codec.uplink=signsgd",
        "wire.broadcast={density=1.0, values='sign'}",
    ),
    "PowerSGD": ("wire.codec.uplink=powersgd", CHANGES, "wire.error_feedback=true"),
    "PowerSGD both ways": (
        "wire.codec={uplink='powersgd', downlink='powersgd'}",
        "wire.broadcast.density=1.0",
        CHANGES,
        "wire.error_feedback=true",
    ),
    "DRIVE": ("wire.codec.uplink=drive", CHANGES),
    "EDEN, 4 bits": ("wire.codec.uplink={target='eden', bits=4}", CHANGES),
}
"""Name -> what differs from FedAvg."""


def of_task(task: str, text: str) -> str:
    """A name or an option with its words replaced by those of a task."""
    for word, value in WORDS[task].items():
        text = text.replace(word, value)
    return text


def measured(out: Path, task: str, name: str) -> list[Report]:
    """One run for each seed."""
    tree, _ = TASKS[task]
    label = re.sub(r"[^a-z0-9]+", "-", of_task(task, name).lower())
    asked = [f'out="{out}"', f"name={task}-{label}", *(of_task(task, option) for option in METHODS[name])]
    runs = [Experiment.from_tree(tree, [*asked, f"seed={seed}"]) for seed in SEEDS]
    return [run(each, quiet=True, resume=is_stopped(each)) for each in runs]


def row(task: str, name: str, reports: Sequence[Report]) -> str:
    """Mean and range of the seeds; MB are means."""
    scores = [r.results.score.scale * (r.results.score.final or float("nan")) for r in reports]
    sizes = [r.ledger.total(by=("direction", "section")) for r in reports]

    def mb(way: str, extra: bool | None = None) -> float:
        kept = [
            sum(
                size
                for (to, part), size in each.items()
                if to == way and extra in (None, str(part).startswith("extra/"))
            )
            for each in sizes
        ]
        return statistics.mean(kept) / 1e6

    options = " ".join(f"`{of_task(task, option)}`" for option in METHODS[name]) or "(the defaults)"
    score = f"{statistics.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"
    moved = f"{mb('up'):.3f} | {mb('down'):.3f} | {mb('up', True) + mb('down', True):.3f}"
    return f"| {of_task(task, name)} | {score} | {moved} | {options} |"


def table(out: Path, task: str) -> str:
    head = f"| algorithm | {TASKS[task][1]} | MB up | MB down | of both: extra MB | beside FedAvg |"
    rows = [row(task, name, measured(out, task, name)) for name in METHODS]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def main(out: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    blocks = {task: table(out, task) for task in TASKS}
    here, today = header(), datetime.datetime.now(datetime.UTC).date()
    used = ", ".join(f"{name} {here[name]}" for name in ("python", "torch", "numpy", "flwr"))
    blocks["versions"] = f"Measured {today} at commit `{commit.strip()}` with {used}, on {here['processor']}."
    for block, content in blocks.items():
        before, after = f"<!-- {block} -->", f"<!-- /{block} -->"
        head, found, rest = text.partition(before)
        _, ended, tail = rest.partition(after)
        assert found, block
        assert ended, block
        text = f"{head}{before}\n{content}\n{after}{tail}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
