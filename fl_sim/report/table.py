"""Tables for a terminal. MB = 10^6 bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.table import Table

from fl_sim.communication.replay import Replayed
from fl_sim.report.groups import Group, grouped
from fl_sim.report.measures import ACCURACY, ALIVE, DOWN, MACS, SAVING, SENT, UP, Measure, named
from fl_sim.report.summary import Report


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}" if count < 1e8 else f"{count / 1e6:.1f}"


def _shown(measure: Measure, report: Report) -> str:
    value = measure.of(report) or 0.0
    return f"{value:.{1 if measure.unit == 'MB' and value >= 100 else measure.digits}f}"


def _table(title: str, headings: Iterable[str], *, text: Collection[str] = ("run",)) -> Table:
    """An empty table; columns hold numbers but for those named in `text`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in headings:
        if name == "run":
            table.add_column(name, overflow="fold", min_width=12)
        else:
            table.add_column(name, justify="left" if name in text else "right", no_wrap=name not in text)
    return table


def comparison(reports: Sequence[Report]) -> Table:
    """One row a run: accuracy, bytes each way, saving against dense FedAvg, densities; fits 80 columns."""
    columns = named((ACCURACY, UP, DOWN, SAVING, SENT, ALIVE), grouped(reports))
    table = _table("measured: bytes that were encoded", ["run", "rounds", *(m.short for m in columns)])
    # Runs of one name are told apart by the keys in which they differ.
    names = {report.folder: group.name for group in grouped(reports) for report in group.reports}
    for report in reports:
        results = report.results
        where = "" if results.engine == "inline" else f" {results.engine}"
        seed = "" if results.seed == 0 else f" seed {results.seed}"
        called = names.get(report.folder, results.name)
        cells = (_shown(measure, report) for measure in columns)
        table.add_row(f"{called}{where}{seed}", str(results.rounds), *cells)
    return table


def over_seeds(groups: Sequence[Group]) -> Table:
    """One row a group of runs that differ only by their seed; fits 80 columns, so only accuracy shows its interval."""
    metric, *columns = named((ACCURACY, UP, DOWN, SAVING, ALIVE, MACS), groups)
    title = f"over seeds: means; {metric.name} ± half a 95 % confidence interval"
    table = _table(title, ["run", "seeds", metric.short, *(measure.short for measure in columns)])
    for group in groups:
        cells = (f"{measure.spread(group).mean or 0.0:.{measure.digits}f}" for measure in columns)
        table.add_row(group.name, str(len(group.reports)), metric.text(group), *cells)
    return table


def per_run(report: Report) -> Table:
    """Table of one run's bytes by direction and section."""
    totals = report.ledger.total(by=("direction", "section"))
    everything = sum(totals.values())
    headings = ("direction", "section", "bytes", "share %")
    table = _table("where the bytes went", headings, text=headings[:2])
    for (direction, section), count in sorted(totals.items(), key=lambda item: -item[1]):
        if count:
            table.add_row(str(direction), str(section), f"{count:,}", f"{100 * count / everything:.2f}")
    table.add_row("both", "all", f"{everything:,}", "100.00", style="bold")
    return table


def estimates(report: Report) -> Table:
    """Table of published formulas on the same messages, beside the measurement."""
    measured = report.results.total_bytes
    headings = ("formula", "MB", "of measured %")
    table = _table("estimates of published code for the same traffic", headings, text=headings[:1])
    table.add_row("measured", _mb(measured), "100.0", style="bold")
    for name, claimed in report.results.estimates.items():
        table.add_row(name, _mb(claimed), f"{_percent(claimed, measured):.1f}")
    return table


def _percent(part: float, whole: float) -> float:
    """Not a number where an imported run says that nothing was sent."""
    return 100 * part / whole if whole else math.nan


def floors(report: Report) -> str:
    """One line on how close masks came to their floor, and on Flower's own framing."""
    results = report.results
    mask, floor, protocol = results.mask_bytes, results.mask_floor_bytes, results.protocol_bytes
    masks = (
        f"masks {_mb(mask)} MB ({_percent(mask, results.total_bytes):.2f} % of all), floor {_mb(floor)} MB; "
        if mask
        else ""
    )
    return f"{masks}Flower's own counters would show {_mb(protocol)} MB for these messages"


def replayed(found: Replayed) -> Table:
    """Bytes of the replayed rounds by direction and section, as measured and as encoded again."""
    first, last, count = found.rounds[0], found.rounds[-1], len(found.rounds)
    which = f"round {first}" if count == 1 else f"{count} rounds from {first} to {last}"
    headings = ("direction", "section", "bytes measured", "bytes encoded again")
    table = _table(f"{which}: all that moved, encoded again", headings, text=headings[:2])
    booked = dict.fromkeys([*found.measured, *found.replayed])  # another codec may have sections that the run did not
    for direction in ("up", "down"):
        for way, section in booked:
            before, after = (sizes.get((way, section), 0) for sizes in (found.measured, found.replayed))
            if way == direction and (before or after):
                table.add_row(direction, section, f"{before:,}", f"{after:,}")
        both = (found.total(direction, replayed=False), found.total(direction))
        table.add_row(direction, "all", *(f"{size:,}" for size in both), style="bold")
    return table
