"""Run the experiments at convergence that have no row yet, one after the other; safe to kill at any moment.

    python experiments/convergence.py                  # everything that is missing, for hours
    python experiments/convergence.py A dense topk_1   # these arms of setting A
    python experiments/convergence.py --plan           # what is missing, without running
    python experiments/convergence.py --data FOLDER    # with CIFAR-10's parquet files from there

A finished run is one small JSON file in experiments/results/. A run that was killed goes on from its last checkpoint. The
learning rate of an arm is the one with the best validation accuracy after `tuning_rounds` rounds under `tuning_seed`, which
is none of the seeds that are reported; its runs leave rows too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_sim import Experiment, Report, run
from fl_sim.report.summary_numbers import moved

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Job:
    """One run: a setting, an arm, a learning rate, a seed, and how many rounds."""

    setting: str
    arm: str
    lr: float
    seed: int
    experiment: Experiment

    @property
    def row(self) -> Path:
        return RESULTS / f"{self.experiment.name}-s{self.seed}.json"

    @property
    def done(self) -> bool:
        return self.row.exists()


def arms(plan: dict, setting: str) -> dict[str, list[str]]:
    """Arm -> what it changes of the setting: the arms of all settings, then those of this one."""
    return {**plan["arms"], **plan["settings"][setting].get("arms", {})}


def job(plan: dict, setting: str, arm: str, lr: float, seed: int, more: Sequence[str] = ()) -> Job:
    """The run of an arm; its name holds everything that tells it from the others.

    Raises:
        UserError: the config refuses the overrides.
    """
    chosen = plan["settings"][setting]
    name = f"{setting}-{arm}-lr{lr:g}" + ("-tuning" if more else "")
    overrides = [*chosen["overrides"], *arms(plan, setting)[arm], f"training.lr={lr}", f"seed={seed}", *more]
    text = [*overrides, f'name="{name}"', 'out="runs/convergence"', *plan.get("overrides", [])]
    return Job(setting, arm, lr, seed, Experiment.load(HERE.parent / chosen["config"], text))


def tuning(plan: dict, setting: str, arm: str) -> list[Job]:
    """The short runs that choose an arm's learning rate; none where the setting has no rounds for it."""
    rounds = plan["settings"][setting]["tuning_rounds"]
    rates = plan["learning_rates"] if rounds else []
    short = [f"rounds={rounds}", f"evaluate.every={rounds}"]
    return [job(plan, setting, arm, lr, plan["tuning_seed"], short) for lr in rates]


def best_rate(jobs: Sequence[Job]) -> float | None:
    """The learning rate with the best validation accuracy; None while a row is missing. The smaller one wins a tie."""
    if not all(job.done for job in jobs):
        return None
    scores = {job.lr: json.loads(job.row.read_text())["validation_accuracy"] for job in jobs}
    return max(sorted(scores), key=scores.__getitem__) if scores else 0.1


def missing(plan: dict, setting: str, arm: str) -> Iterator[Job]:
    """What an arm still needs, in order: runs for its learning rate, then its seeds. Asked again after each run.

    A twin takes the learning rate of the arm beside which it stands, so that the two differ in one thing.
    """
    trials = tuning(plan, setting, plan.get("twins", {}).get(arm, arm))
    yield from (trial for trial in trials if not trial.done)
    lr = best_rate(trials)
    if lr is not None:
        seeds = plan["settings"][setting].get("seeds", plan["seeds"])
        yield from (one for one in (job(plan, setting, arm, lr, seed) for seed in seeds) if not one.done)


def row_of(done: Job, report: Report) -> dict:
    """What one finished run leaves: its settings, results, bytes by direction and section, code version, hardware."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    by_section = report.ledger.total(by=("direction", "section"))
    last = [row for row in report.rounds if "validation_accuracy" in row]
    return {
        "setting": done.setting,
        "arm": done.arm,
        "lr": done.lr,
        "seed": done.seed,
        "validation_accuracy": last[-1]["validation_accuracy"],
        "bytes": {"/".join(map(str, key)): count for key, count in sorted(by_section.items())},
        "curve": [[row["round"], row["accuracy"], moved(row)] for row in report.rounds if "accuracy" in row],
        "code": git.stdout.strip(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} processors",
        "summary": report.summary,
    }


def write(path: Path, row: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    waiting = path.with_suffix(".part")
    waiting.write_text(json.dumps(row, indent=1, sort_keys=True, default=float) + "\n")
    waiting.replace(path)  # a kill leaves a whole row or none


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("setting", nargs="?", help="one setting; all without it")
    parser.add_argument("arms", nargs="*", help="some of its arms; all without them")
    parser.add_argument("--data", metavar="FOLDER", help="CIFAR-10 as parquet files; without it torchvision fetches it")
    parser.add_argument("--plan", action="store_true", help="say what is missing, run nothing")
    asked = parser.parse_args(argv)
    plan = tomllib.loads((HERE / "settings.toml").read_text())
    plan["overrides"] = [f'data.source="{asked.data}"'] if asked.data else []
    for setting in [asked.setting] if asked.setting else plan["settings"]:
        for arm in asked.arms or arms(plan, setting):
            for one in missing(plan, setting, arm):
                print(one.experiment.name, "seed", one.seed, flush=True)
                if not asked.plan:
                    write(one.row, row_of(one, run(one.experiment, resume=True)))


if __name__ == "__main__":
    main()
