"""The numbers that every table of a comparison shows, whatever its format: one `Measure` a column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fl_sim.report.groups import Group, Spread
from fl_sim.report.summary import Report


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
        name, unit: the column's heading.
        of: the number in `unit`; None where the run has none.
        digits: decimals shown.
    """

    name: str
    unit: str
    of: Callable[[Report], float | None]
    digits: int = 2

    @property
    def heading(self) -> str:
        """Name and unit."""
        return f"{self.name} [{self.unit}]"

    def spread(self, group: Group) -> Spread:
        """The number over a group's seeds."""
        return group.spread(self.of)

    def text(self, group: Group) -> str:
        """Mean, confidence interval, for a reader."""
        return self.spread(group).text(self.digits)


@dataclass(frozen=True)
class At:
    """A number of the summary, times `scale`."""

    path: tuple[str, ...]
    scale: float = 1.0

    def __call__(self, report: Report) -> float:
        return self.scale * report.number(*self.path)


@dataclass(frozen=True)
class Entry:
    """MB of an entry of one of the summary's tables of bytes; None where it has no such entry, or none was reached."""

    table: str
    key: str

    def __call__(self, report: Report) -> float | None:
        table = report.summary.get(self.table)
        size = table.get(self.key) if isinstance(table, dict) else None
        return size / 1e6 if isinstance(size, (int, float)) else None


MEASURES: tuple[Measure, ...] = (
    Measure("accuracy", "%", At(("accuracy", "final"), 100)),
    Measure("up", "MB", At(("uplink_bytes",), 1e-6), 3),
    Measure("down", "MB", At(("downlink_bytes",), 1e-6), 3),
    Measure("saving", "%", At(("saving",), 100)),
    Measure("sent", "%", At(("density", "uplink_mean"), 100), 1),
    Measure("alive", "%", At(("density", "prunable"), 100), 1),
    Measure("MACs", "10^6", At(("macs", "mean"), 1e-6), 3),
)
TOTAL = Measure("total", "MB", At(("total_bytes",), 1e-6), 3)
LAST = Measure("last ten rounds", "%", At(("accuracy", "last10_mean"), 100))
"""Mean test accuracy of the last ten rounds that were evaluated: what runs are compared by."""
ACCURACY, SAVING, ALIVE = MEASURES[0], MEASURES[3], MEASURES[5]


def _entries(groups: Sequence[Group], name: str) -> list[str]:
    """Keys of a summary's table that have a number in any run, in their order."""
    tables = [report.summary.get(name) for group in groups for report in group.reports]
    found = (key for table in tables if isinstance(table, dict) for key, size in table.items() if size is not None)
    return list(dict.fromkeys(found))


def targets(groups: Sequence[Group], *, most: int = 6) -> list[Measure]:
    """MB of both directions to first reach a test accuracy, for the highest accuracies that any run reached."""
    chosen = sorted(_entries(groups, "bytes_to_accuracy"), key=float)[-most:]
    return [Measure(f"to {100 * float(level):.0f} %", "MB", Entry("bytes_to_accuracy", level), 3) for level in chosen]


def claims(groups: Sequence[Group]) -> list[Measure]:
    """What the published formulas claim for the training messages."""
    return [Measure(name, "MB", Entry("estimates", name), 3) for name in _entries(groups, "estimates")]
