"""Runs beside a baseline, seed by seed: what each costs for what the baseline reached.

[m.text(group) for m in against(groups, "cifar10-dense")]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from fl_sim.core.types import UserError
from fl_sim.report.groups import Group
from fl_sim.report.measures import DOWN, LAST, SENT, UP, Measure, last_ten, named, score_of
from fl_sim.report.same_data import same_data
from fl_sim.report.summary import Report, bytes_of_run

POINTS = 1.0
"""What a run may fall short of the baseline's end, in points of accuracy, or percent of a metric that is no share."""


@dataclass(frozen=True)
class Beside:
    """A number of a run and of the baseline's run with the same seed; None without one, or where it is on other data."""

    baseline: Mapping[int, Report]
    of: Callable[[Report, Report], float | None]

    def __call__(self, report: Report) -> float | None:
        base = self.baseline.get(report.results.seed)
        return self.of(report, base) if base is not None and same_data(report, base) else None


def _difference(report: Report, base: Report) -> float:
    return last_ten(report) - last_ten(base)


def _share(report: Report, base: Report) -> float | None:
    return _percent(report.results.total_bytes, base.results.total_bytes)


def _megabytes_to_its_end(report: Report, base: Report) -> float | None:
    score, end = report.results.score, last_ten(base)
    short = POINTS if score.percent else abs(end) * POINTS / 100
    target = (end - short if score.higher else end + short) / score.scale
    size = bytes_of_run(report, target)
    return None if size is None else size / 1e6


def _macs(report: Report) -> float | None:
    return _percent(report.results.macs.mean, report.results.macs.dense)


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def against(groups: Sequence[Group], baseline: str) -> list[Measure]:
    """Columns beside the group of this name; differences are paired by seed, of runs on the same data.

    Raises:
        UserError: no group has this name.
    """
    by_name, score = {group.name: group for group in groups}, score_of(groups)
    if baseline not in by_name:
        raise UserError(f"--baseline {baseline!r}: no such run; allowed: {', '.join(by_name)}")
    runs = {report.results.seed: report for report in by_name[baseline].reports}
    return [
        *named([LAST], groups),
        Measure("beyond", "points" if score.percent else score.name, Beside(runs, _difference)),
        UP,
        DOWN,
        Measure("bytes", "% of its", Beside(runs, _share), 1),
        Measure(
            "to its end less a point" if score.percent else "to its end less 1 %",
            "MB",
            Beside(runs, _megabytes_to_its_end),
            3,
        ),
        Measure("MACs", "% of dense", _macs, 1),
        SENT,
    ]


def beside(groups: Sequence[Group], baseline: str) -> Table:
    """One row a group; see `against`."""
    columns = against(groups, baseline)
    table = Table(
        title=f"beside {baseline}, seed by seed: mean ± half a 95 % confidence interval", title_justify="left"
    )
    table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    table.add_column("run", overflow="fold", min_width=15)
    for measure in columns:
        table.add_column(f"{measure.name}\n{measure.unit}", justify="right")
    for group in groups:
        table.add_row(group.name, *(measure.text(group) for measure in columns))
    return table
