"""Reads finished runs and writes the two tables that the charts are drawn from.

    fl-sim sweep configs/quickstart.toml configs/topk_both_ways.toml configs/digits_adaptive.toml \
        configs/digits_rate_distortion.toml rounds=40 evaluate.every=2 --seeds 0,1,2 --out runs/figures
    python docs/figures/collect.py runs/figures
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

from fl_sim import Report

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    reports = [Report.load(path.parent) for path in folder.glob("*/summary.json")]
    reports.sort(key=lambda report: (str(report.summary["name"]), report.results.seed))
    with (HERE / "accuracy_by_traffic.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["run", "seed", "round", "bytes", "accuracy"])
        for report in reports:
            for row in report.rounds:
                if "accuracy" in row:
                    sent = row["uplink_bytes"] + row["downlink_bytes"]  # both are sums over the rounds so far
                    identity = (report.summary["name"], report.summary["seed"])
                    out.writerow([*identity, int(row["round"]), int(sent), f"{row['accuracy']:.6f}"])
    with (HERE / "bytes_by_section.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["run", "direction", "section", "bytes"])
        for name in ("quickstart", "topk-both-ways"):
            (report,) = (r for r in reports if r.summary["name"] == name and r.summary["seed"] == 0)
            totals = Counter({key: int(size) for key, size in report.ledger.total(by=("direction", "section")).items()})
            out.writerows([name, *key, size] for key, size in sorted(totals.items()) if size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
