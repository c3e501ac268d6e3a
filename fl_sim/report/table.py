"""Tables for a terminal. MB = 10^6 bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from rich import box
from rich.table import Table

from fl_sim.config import Json
from fl_sim.report.summary import Report


def _number(summary: Mapping[str, Json], *path: str) -> float:
    node: Json = dict(summary)
    for key in path:
        node = cast(dict[str, Json], node)[key]
    return float(cast(float, node))


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}" if count < 1e8 else f"{count / 1e6:.1f}"


COLUMNS: Mapping[str, Callable[[Mapping[str, Json]], str]] = {
    "rounds": lambda s: str(s["rounds"]),
    "accuracy %": lambda s: f"{100 * _number(s, 'accuracy', 'final'):.2f}",
    "MB up": lambda s: _mb(_number(s, "uplink_bytes")),
    "MB down": lambda s: _mb(_number(s, "downlink_bytes")),
    "saving %": lambda s: f"{100 * _number(s, 'saving'):.2f}",
    "sent %": lambda s: f"{100 * _number(s, 'density', 'uplink_mean'):.1f}",
    "alive %": lambda s: f"{100 * _number(s, 'density', 'prunable'):.1f}",
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
    for report in reports:
        s = report.summary
        where = "" if s["engine"] == "inline" else f" {s['engine']}"
        seed = "" if s["seed"] == 0 else f" seed {s['seed']}"
        table.add_row(f"{s['name']}{where}{seed}", *(cell(s) for cell in COLUMNS.values()))
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
    measured = _number(report.summary, "total_bytes")
    table = Table(
        title="estimates of published code for the same traffic",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("formula", "MB", "of measured %"):
        table.add_column(name, justify="left" if name == "formula" else "right")
    table.add_row("measured", _mb(measured), "100.0", style="bold")
    for name, value in cast(dict[str, float], report.summary["estimates"]).items():
        table.add_row(name, _mb(value), f"{100 * value / measured:.1f}")
    return table


def floors(report: Report) -> str:
    """One line on how close masks came to their floor, and on Flower's own framing."""
    s = report.summary
    mask, floor, protocol, total = (
        _number(s, k) for k in ("mask_bytes", "mask_floor_bytes", "protocol_bytes", "total_bytes")
    )
    masks = f"masks {_mb(mask)} MB ({100 * mask / total:.2f} % of all), floor {_mb(floor)} MB; " if mask else ""
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
