"""Tables for a terminal. MB = 10^6 bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.table import Table

from fl_sim.report.groups import Group, grouped
from fl_sim.report.measures import MEASURES
from fl_sim.report.summary import Report


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}" if count < 1e8 else f"{count / 1e6:.1f}"


COLUMNS: Mapping[str, Callable[[Report], str]] = {
    "rounds": lambda r: str(r.summary["rounds"]),
    "accuracy %": lambda r: f"{100 * r.number('accuracy', 'final'):.2f}",
    "MB up": lambda r: _mb(r.number("uplink_bytes")),
    "MB down": lambda r: _mb(r.number("downlink_bytes")),
    "saving %": lambda r: f"{100 * r.number('saving'):.2f}",
    "sent %": lambda r: f"{100 * r.number('density', 'uplink_mean'):.1f}",
    "alive %": lambda r: f"{100 * r.number('density', 'prunable'):.1f}",
}


def comparison(reports: Sequence[Report]) -> Table:
    """One row a run: accuracy, bytes each way, saving against dense FedAvg, densities; fits 80 columns."""
    table = Table(
        title="measured: bytes that were encoded and moved",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("run", overflow="fold", min_width=15)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    # Runs of one name are told apart by the keys in which they differ.
    names = {report.folder: group.name for group in grouped(reports) for report in group.reports}
    for report in reports:
        s = report.summary
        where = "" if s["engine"] == "inline" else f" {s['engine']}"
        seed = "" if s["seed"] == 0 else f" seed {s['seed']}"
        called = names.get(report.folder, str(s["name"]))
        table.add_row(f"{called}{where}{seed}", *(cell(report) for cell in COLUMNS.values()))
    return table


def over_seeds(groups: Sequence[Group]) -> Table:
    """One row a group of runs that differ only by their seed; fits 80 columns, so only accuracy shows its interval."""
    table = Table(
        title="over seeds: means; accuracy ± half a 95 % confidence interval",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("run", overflow="fold", min_width=15)
    for name in ("seeds", "accuracy %", "MB up", "MB down", "saving %", "alive %", "M MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    accuracy, up, down, saving, _, alive, macs = MEASURES
    for group in groups:
        means = [m.spread(group).mean or 0.0 for m in (up, down, saving, alive, macs)]
        cells = (f"{mean:.{digits}f}" for mean, digits in zip(means, (3, 3, 2, 1, 3), strict=True))
        table.add_row(group.name, str(len(group.reports)), accuracy.text(group), *cells)
    return table


def per_run(report: Report) -> Table:
    """Where the bytes of one run went, by direction and section."""
    totals = report.ledger.total(by=("direction", "section"))
    everything = sum(totals.values())
    table = Table(title="where the bytes went", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("direction", "section", "bytes", "share %"):
        table.add_column(name, justify="right" if name in ("bytes", "share %") else "left")
    for (direction, section), count in sorted(totals.items(), key=lambda item: -item[1]):
        if count:
            table.add_row(str(direction), str(section), f"{count:,}", f"{100 * count / everything:.2f}")
    table.add_row("both", "all", f"{everything:,}", "100.00", style="bold")
    return table


def estimates(report: Report) -> Table:
    """What published formulas would have claimed for the same messages, beside what was measured."""
    measured = report.number("total_bytes")
    table = Table(
        title="estimates of published code for the same traffic",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("formula", "MB", "of measured %"):
        table.add_column(name, justify="left" if name == "formula" else "right")
    table.add_row("measured", _mb(measured), "100.0", style="bold")
    claimed = report.summary["estimates"]
    for name in claimed if isinstance(claimed, dict) else ():
        value = report.number("estimates", name)
        table.add_row(name, _mb(value), f"{_percent(value, measured):.1f}")
    return table


def _percent(part: float, whole: float) -> float:
    """Not a number where an imported run says that nothing was sent."""
    return 100 * part / whole if whole else math.nan


def floors(report: Report) -> str:
    """One line on how close masks came to their floor, and on Flower's own framing."""
    mask, floor, protocol, total = (
        report.number(k) for k in ("mask_bytes", "mask_floor_bytes", "protocol_bytes", "total_bytes")
    )
    masks = f"masks {_mb(mask)} MB ({_percent(mask, total):.2f} % of all), floor {_mb(floor)} MB; " if mask else ""
    return f"{masks}Flower's own counters would show {_mb(protocol)} MB for these messages"


def repriced(report: Report, price: Mapping[str, float], name: str) -> Table:
    """A run's training traffic as measured and as another codec would price it."""
    totals = report.ledger.total(by=("direction", "phase"))
    table = Table(
        title="training traffic under another codec", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("codec", "MB up", "MB down", "MB total"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    measured = {direction: totals.get((direction, "train"), 0) for direction in ("up", "down")}
    for label, row in (("measured", measured), (name, price)):
        table.add_row(label, _mb(row["up"]), _mb(row["down"]), _mb(row["up"] + row["down"]))
    return table
