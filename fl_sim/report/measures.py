"""The numbers that every table of a comparison shows, whatever its format: one `Measure` a column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fl_sim.core.types import UserError
from fl_sim.report.charts import Quantity
from fl_sim.report.groups import Group, Spread
from fl_sim.report.same_data import same_data
from fl_sim.report.schema import Score, Summary
from fl_sim.report.summary import Report, bytes_of_run


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
        name, unit: the column's heading.
        of: the number in `unit`; None where the run has none.
        digits: decimals shown.
        short: the heading in a table of 80 columns.
    """

    name: str
    unit: str
    of: Callable[[Report], float | None]
    digits: int = 2
    short: str = ""

    @property
    def heading(self) -> str:
        """Name and unit."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name

    def spread(self, group: Group) -> Spread:
        """The number over a group's seeds."""
        return group.spread(self.of)

    def text(self, group: Group) -> str:
        """Mean, confidence interval, for a reader."""
        return self.spread(group).text(self.digits)


def _final(report: Report) -> float | None:
    score = report.results.score
    return None if score.final is None else score.scale * score.final


ACCURACY = Measure("accuracy", "%", _final, short="accuracy %")
"""The task's metric; `named` gives it its name."""
UP = Measure("up", "MB", lambda report: 1e-6 * report.results.uplink_bytes, 3, short="MB up")
DOWN = Measure("down", "MB", lambda report: 1e-6 * report.results.downlink_bytes, 3, short="MB down")
SAVING = Measure("saving", "%", lambda report: 100 * report.results.saving, short="saving %")
SENT = Measure("sent", "%", lambda report: 100 * report.results.density.uplink_mean, 1, short="sent %")
ALIVE = Measure("alive", "%", lambda report: 100 * report.results.density.prunable, 1, short="alive %")
MACS = Measure("MACs", "10^6", lambda report: 1e-6 * report.results.macs.mean, 3, short="M MACs")
MEASURES = (ACCURACY, UP, DOWN, SAVING, SENT, ALIVE, MACS)
"""The columns of every comparison."""
TOTAL = Measure("total", "MB", lambda report: 1e-6 * report.results.total_bytes, 3, short="MB total")


def last_ten(report: Report) -> float:
    """Mean test metric of the last ten rounds that were evaluated, in percent where it is a share; NaN if not finite."""
    score = report.results.score
    return math.nan if score.last10_mean is None else score.scale * score.last10_mean


LAST = Measure("last ten rounds", "%", last_ten)
"""What runs are compared by: the task's metric."""


def paired(group: Group, other: Group) -> Spread:
    """Difference of their metrics, seed by seed, as `compare --baseline` has it: a seed shares data and cohorts.

    Runs on different data are no pair.
    """
    first, second = ({report.results.seed: report for report in each.reports} for each in (group, other))
    pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    return Spread.of((LAST.of(a) or 0.0) - (LAST.of(b) or 0.0) for a, b in pairs if same_data(a, b))


def score_of(groups: Sequence[Group]) -> Score:
    """What all runs are measured by.

    Raises:
        UserError: runs of tasks that are measured by different metrics.
    """
    reports = [report for group in groups for report in group.reports]
    for report in reports:
        if report.results.score.name != reports[0].results.score.name:
            both = [f"{r.folder.name} is measured by {r.results.score.name}" for r in (reports[0], report)]
            raise UserError(f"{', '.join(both)}; needed: runs of one task")
    return reports[0].results.score


def metric_axis(groups: Sequence[Group], words: str = "test") -> Quantity:
    """What an axis shows of the metric: `test accuracy [%]`."""
    score = score_of(groups)
    return Quantity(f"{words} {score.name}", score.unit)


def named(measures: Sequence[Measure], groups: Sequence[Group]) -> list[Measure]:
    """The measures, with the metric of these runs under its own name and unit."""
    score = score_of(groups)
    names = {  # by identity: beside a baseline a measure holds reports, which have no hash
        id(ACCURACY): replace(ACCURACY, name=score.name, unit=score.unit, short=f"{score.name} {score.unit}".rstrip()),
        id(LAST): replace(LAST, unit=score.unit),
    }
    return [names.get(id(measure), measure) for measure in measures]


@dataclass(frozen=True)
class Entry:
    """MB of the entry `key` of one of the summary's tables of bytes; None where a run has no such entry, or null."""

    table: Callable[[Summary], Mapping[str, int | None]]
    key: str

    def __call__(self, report: Report) -> float | None:
        size = self.table(report.results).get(self.key)
        return None if size is None else size / 1e6


def _columns(groups: Sequence[Group], table: Callable[[Summary], Mapping[str, int | None]]) -> list[str]:
    """Keys of a summary's table that have a number in any run, in their order."""
    tables = [table(report.results) for group in groups for report in group.reports]
    return list(dict.fromkeys(key for each in tables for key, size in each.items() if size is not None))


def _reached(summary: Summary) -> Mapping[str, int | None]:
    return summary.bytes_to_accuracy or summary.bytes_to_metric


@dataclass(frozen=True)
class MegabytesTo:
    """MB of both directions until the test metric first reached `level`; None where it never did."""

    level: float

    def __call__(self, report: Report) -> float | None:
        size = bytes_of_run(report, self.level)
        return None if size is None else size / 1e6


def _claimed(summary: Summary) -> Mapping[str, int | None]:
    return summary.estimates


def levels(groups: Sequence[Group], *, most: int = 6) -> list[str]:
    """The best levels of the test metric that any run reached, as the summaries' keys, the hardest last."""
    return sorted(_columns(groups, _reached), key=float, reverse=not score_of(groups).higher)[-most:]


def level_text(groups: Sequence[Group], level: str) -> str:
    """`to 85 %`, or `to 4.5` of a metric that is no share."""
    return f"to {100 * float(level):.0f} %" if score_of(groups).percent else f"to {float(level):g}"


def targets(groups: Sequence[Group]) -> list[Measure]:
    """MB of both directions to first reach a level of the test metric, for the best levels that any run reached."""
    return [Measure(level_text(groups, level), "MB", MegabytesTo(float(level)), 3) for level in levels(groups)]


def claims(groups: Sequence[Group]) -> list[Measure]:
    """Bytes that published formulas claim for the training messages."""
    return [Measure(name, "MB", Entry(_claimed, name), 3) for name in _columns(groups, _claimed)]
