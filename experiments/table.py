"""The table of the experiments at convergence, from the rows that are there.

    python experiments/table.py                      # Markdown, a table for each setting
    python experiments/table.py --curves curves.html # test accuracy over MB as well, for a browser

Numbers are means over the seeds with half a 95 % confidence interval (Student's t). Differences are taken seed by seed from
dense FedAvg. MB to dense minus a point are counted to the first evaluation whose mean with the nine before it is there: single
evaluations go up and down by several points from one to the next. So are those to an arm's own end, which say what it saves at
the accuracy that it has. An arm with fewer than three seeds has its number of seeds
in bold and supports no claim.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_sim.report.groups import Spread

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BASELINE = "dense"
WINDOW = 10
"""Evaluations whose mean counts as the end of a run."""
ENOUGH = 3
"""Seeds from which on an effect is claimed."""
COLUMNS = (
    "arm",
    "learning rate",
    "seeds",
    "last evaluation %",
    "mean of the last ten %",
    "beside dense, points",
    "MB up",
    "MB down",
    "% of dense's bytes",
    "MB to dense minus a point",
    "% of dense's MB to it",
    "% of dense's MB to its own end",
    "MACs, % of dense's",
)


@dataclass(frozen=True)
class Row:
    """A finished run of an arm: its rate, seed, evaluations (round, accuracy in %, bytes of both directions so far), summary."""

    arm: str
    lr: float
    seed: int
    curve: tuple[tuple[int, float, int], ...]
    summary: Mapping[str, float]
    macs: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> Row:
        """A row as experiments/convergence.py leaves it."""
        tree = json.loads(path.read_text())
        curve = tuple((number, 100 * accuracy, so_far) for number, accuracy, so_far in tree["curve"])
        return cls(tree["arm"], tree["lr"], tree["seed"], curve, tree["summary"], tree["summary"]["macs"])

    @property
    def end(self) -> float:
        """Mean of the last ten evaluations, %."""
        last = [accuracy for _, accuracy, _ in self.curve[-WINDOW:]]
        return sum(last) / len(last)

    def megabytes_to(self, target: float) -> float | None:
        """MB up to the first evaluation whose mean with the nine before it is at least `target` %; None without one."""
        for last in range(WINDOW, len(self.curve) + 1):
            if sum(accuracy for _, accuracy, _ in self.curve[last - WINDOW : last]) / WINDOW >= target:
                return self.curve[last - 1][2] / 1e6
        return None

    def share_to(self, target: float, base: Row) -> float | None:
        """`megabytes_to` in % of what `base` needs for the same; None where one of the two never gets there."""
        own, whole = self.megabytes_to(target), base.megabytes_to(target)
        return 100 * own / whole if own and whole else None


def rows(setting: str, tuning_seed: int, folder: Path = RESULTS) -> dict[str, list[Row]]:
    """Arm -> its rows by seed; the runs that chose a learning rate are left out."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob(f"{setting}-*.json")):
        row = Row.read(path)
        if row.seed != tuning_seed:
            found.setdefault(row.arm, []).append(row)
    return found


def line(arm: str, of: Sequence[Row], dense: Mapping[int, Row]) -> list[str]:
    """An arm's cells, as `COLUMNS`."""

    def paired(value: Callable[[Row, Row], float | None]) -> list[float | None]:
        return [value(row, dense[row.seed]) if row.seed in dense else None for row in of]

    seeds = str(len(of)) if len(of) >= ENOUGH else f"**{len(of)}**"
    return [
        f"`{arm}`",
        ", ".join(sorted({f"{row.lr:g}" for row in of})),
        seeds,
        Spread.of(row.curve[-1][1] for row in of).text(1),
        Spread.of(row.end for row in of).text(1),
        "" if arm == BASELINE else Spread.of(paired(lambda row, base: row.end - base.end)).text(1),
        Spread.of(row.summary["uplink_bytes"] / 1e6 for row in of).text(1),
        Spread.of(row.summary["downlink_bytes"] / 1e6 for row in of).text(1),
        Spread.of(paired(lambda row, base: 100 * row.curve[-1][2] / base.curve[-1][2])).text(2),
        Spread.of(paired(lambda row, base: row.megabytes_to(base.end - 1))).text(1),
        Spread.of(paired(lambda row, base: row.share_to(base.end - 1, base))).text(2),
        Spread.of(paired(lambda row, base: row.share_to(row.end, base))).text(2),
        Spread.of(paired(lambda row, base: 100 * row.macs["mean"] / base.macs["dense"])).text(1),
    ]


def table(arms: Mapping[str, Sequence[Row]], order: Sequence[str]) -> str:
    """Markdown, a line for each arm that has rows."""
    dense = {row.seed: row for row in arms.get(BASELINE, ())}
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [line(arm, arms[arm], dense) for arm in order if arm in arms]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def sides(arms: Mapping[str, Sequence[Row]], twins: Mapping[str, str]) -> str:
    """Markdown, a line for each twin with rows: how far it ends from the arm that it repeats, seed by seed."""
    lines = []
    for twin, other in twins.items():
        beside = {row.seed: row for row in arms.get(other, ())}
        gaps = [row.end - beside[row.seed].end for row in arms.get(twin, ()) if row.seed in beside]
        if gaps:
            told = "" if len(gaps) >= ENOUGH else f" ({len(gaps)} seeds: no claim)"
            lines.append(f"`{twin}` ends {Spread.of(gaps).text(1)} points from `{other}`{told}")
    return "\n\n".join(lines)


def draw(settings: Mapping[str, Mapping[str, Sequence[Row]]], path: Path) -> None:
    """One chart for each setting: every run's test accuracy over the MB of both directions, an arm in one colour."""
    from plotly import colors
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(settings), cols=1, subplot_titles=[f"setting {name}" for name in settings])
    for place, arms in enumerate(settings.values(), start=1):
        for index, (arm, of) in enumerate(arms.items()):
            colour = colors.qualitative.Safe[index % len(colors.qualitative.Safe)]
            for row in of:
                label = f"{arm}, seed {row.seed}"
                x, y = [so_far / 1e6 for _, _, so_far in row.curve], [accuracy for _, accuracy, _ in row.curve]
                figure.add_trace(go.Scatter(x=x, y=y, name=label, line={"color": colour}), row=place, col=1)
    figure.update_xaxes(type="log", title="MB of both directions")
    figure.update_yaxes(title="test accuracy, %")
    figure.update_layout(height=500 * len(settings), template="plotly_white")
    figure.write_html(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--curves", metavar="FILE", type=Path, help="write the curves as an HTML page as well")
    asked = parser.parse_args(argv)
    plan = tomllib.loads((HERE / "settings.toml").read_text())
    found = {setting: rows(setting, plan["tuning_seed"]) for setting in plan["settings"]}
    found = {setting: arms for setting, arms in found.items() if arms}
    for setting, arms in found.items():
        beside = sides(arms, plan["twins"])
        order = list(
            {**plan["arms"], **plan["settings"][setting].get("arms", {})}
        )  # a setting may change an arm of all
        print(f"Setting {setting}\n\n{table(arms, order)}\n" + (f"\n{beside}\n" if beside else ""))
    if asked.curves:
        draw(found, asked.curves)


if __name__ == "__main__":
    main()
