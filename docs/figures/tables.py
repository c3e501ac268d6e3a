"""Writes the measured tables of docs/benchmarks.md from finished runs, with the date and the commit.

    python docs/figures/tables.py runs/figures runs/comparison

`make figures` runs everything that this needs.
"""

from __future__ import annotations

import csv
import datetime
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "benchmarks.md"
METHODS = {
    "everything": ("everything composed", "everything"),
    "topk-both-ways": ("top-k int4 both ways", "topk_both_ways"),
    "quickstart": ("dense FedAvg", "quickstart"),
    "quickstart-topk": ("top-10 % up", "quickstart_topk"),
    "digits-adaptive": ("adaptive pruning, gates and half of the channels up", "digits_adaptive"),
    "digits-pruned": ("magnitude pruning", "digits_pruned"),
    "digits-pruned-distilled": ("the same, distilled on the server", "digits_pruned_distilled"),
    "digits-rate-distortion": ("rate-distortion pruning", "digits_rate_distortion"),
    "digits-distillation": ("distillation from the global model", "digits_distillation"),
    "digits-capacities": ("two capacities, distilled on the server", "digits_capacities"),
    "digits-batchnorm": ("BatchNorm only, ResNet-14", "digits_batchnorm"),
}
"""Name of a run -> what the table calls it, its config."""
BLOCKS = ("accuracy-by-traffic", "all-methods-on-the-digits")
Row = Mapping[str, str]


def compared(folder: Path, *options: str) -> dict[str, Row]:
    """The rows of `fl-sim compare`, by name of the run."""
    runs = sorted(str(path.parent) for path in folder.glob("*/summary.json"))
    command = [sys.executable, "-m", "fl_sim.cli", "compare", *runs, "--format", "csv", *options]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {row["run"]: row for row in csv.DictReader(said.splitlines())}


def table(folder: Path) -> str:
    """Mean and half a 95 % confidence interval by method, and the paired difference to dense FedAvg."""
    measured, beside = compared(folder), compared(folder, "--baseline", "quickstart")
    lines = [
        "| method | config | accuracy % | beside dense, points | MB up | MB down | saving % | alive % | M MACs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (called, config) in METHODS.items():
        if name in measured:
            row, paired = measured[name], beside[name]
            difference = "" if name == "quickstart" else interval(paired, "beyond [points]", signed=True)
            cells = [
                called,
                f"`configs/{config}.toml`",
                interval(row, "accuracy [%]"),
                difference,
                *(f"{float(row[column]):.3f}" for column in ("up [MB]", "down [MB]")),
                f"{float(row['saving [%]']):.2f}",
                f"{float(row['alive [%]']):.0f}",
                f"{float(row['MACs [10^6]']):.3f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(row: Row, column: str, *, signed: bool = False) -> str:
    mean, half = float(row[column]), float(row[f"{column} ci95"])
    return f"{mean:+.2f} ± {half:.2f}" if signed else f"{mean:.2f} ± {half:.2f}"


def main(*folders: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    stamp = f" {datetime.datetime.now(datetime.UTC).date()} | `{commit.strip()}` | current |"
    for block, folder in zip(BLOCKS, folders, strict=True):
        start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
        text, found = re.subn(f"{start}.*?{end}", f"{start}\n{table(folder)}\n\n{end}", text, flags=re.DOTALL)
        text, stamped = re.subn(rf"(\(#{block}\)[^|]*\|)[^|]*\|[^|]*\|[^|]*\|", rf"\1{stamp}", text)
        assert (found, stamped) == (1, 1), block
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
