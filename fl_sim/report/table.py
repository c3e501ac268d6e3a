"""Tables for a terminal. MB = 10^6 bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

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


def comparison(reports: Sequence[Report]) -> Table:
    """One row a run: accuracy, bytes each way, saving against dense FedAvg, densities, MACs."""
    table = Table(title="measured communication: bytes that were encoded and moved", title_justify="left")
    table.add_column("run")
    for name in (
        "rounds",
        "accuracy %",
        "last-10 %",
        "MB up",
        "MB down",
        "MB total",
        "saving %",
        "sent %",
        "alive %",
        "MMACs",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        s = report.summary
        table.add_row(
            f"{s['name']} ({s['engine']}, seed {s['seed']})",
            str(s["rounds"]),
            f"{100 * _number(s, 'accuracy', 'final'):.2f}",
            f"{100 * _number(s, 'accuracy', 'last10_mean'):.2f}",
            _mb(_number(s, "uplink_bytes")),
            _mb(_number(s, "downlink_bytes")),
            _mb(_number(s, "total_bytes")),
            f"{100 * _number(s, 'saving'):.2f}",
            f"{100 * _number(s, 'density', 'uplink_mean'):.1f}",
            f"{100 * _number(s, 'density', 'prunable'):.1f}",
            f"{_number(s, 'macs', 'mean') / 1e6:.2f}",
        )
    return table


def per_run(report: Report) -> Table:
    """Where the bytes of one run went, by direction and section."""
    totals = report.ledger.total(by=("direction", "section"))
    everything = sum(totals.values())
    table = Table(title="where the bytes went", title_justify="left")
    for name in ("direction", "section", "bytes", "share %"):
        table.add_column(name, justify="right" if name in ("bytes", "share %") else "left")
    for (direction, section), count in sorted(totals.items(), key=lambda item: -item[1]):
        if count:
            table.add_row(str(direction), str(section), f"{count:,}", f"{100 * count / everything:.2f}")
    table.add_row("both", "all", f"{everything:,}", "100.00", style="bold")
    return table
