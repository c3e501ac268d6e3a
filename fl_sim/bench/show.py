"""Benchmark results with the header that makes them results: processor, threads, versions, form of the kernels."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from fl_sim.core import kernels

if TYPE_CHECKING:
    from fl_sim.bench import additivity, asynchrony, codec, cohort, density, inference, peer_table, pruning, recorded
    from fl_sim.bench import capacity_study as study

    Rows = Sequence[
        asynchrony.Measured
        | codec.Row
        | cohort.Row
        | density.Row
        | pruning.Row
        | additivity.Row
        | inference.Row
        | recorded.Row
        | peer_table.Row
        | study.Row
    ]


def header() -> dict[str, str]:
    """Hardware and versions behind a benchmark's numbers."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processor = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    packages = {name: version(name) for name in ("torch", "flwr", "ray", "numpy", "constriction", "zstandard")}
    machine = {"processor": processor, "cpus": str(os.cpu_count()), "python": platform.python_version()}
    return {**machine, **packages, "kernels": kernels.FORM}


def show(console: Console, results: Mapping[str, float | str], *, as_json: bool) -> None:
    """A flat table of numbers."""
    if as_json:
        console.print_json(json.dumps({"machine": header(), **results}))
        return
    console.print(" · ".join(f"{k} {v}" for k, v in header().items()), highlight=False)
    table = Table("measure", "value")
    for name, value in results.items():
        table.add_row(name, _told(value))
    console.print(table)


def markdown(results: Mapping[str, float | str]) -> str:
    """Format a benchmark as a Markdown table under a line that names the machine; quartiles stand behind their median."""
    machine = " · ".join(f"{k} {v}" for k, v in header().items())
    lines = [machine, "", "| measure | median | quartiles |", "|---|---|---|"]
    for name, value in results.items():
        if name.endswith(("_q1", "_q3")):
            continue
        low, high = results.get(f"{name}_q1"), results.get(f"{name}_q3")
        between = "" if low is None or high is None else f"{_told(low)} to {_told(high)}"
        lines.append(f"| {name} | {_told(value)} | {between} |")
    return "\n".join(lines)


def _told(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def document(rows: Rows) -> str:
    """Equal rows as one JSON object, with the machine."""
    return json.dumps({"machine": header(), "rows": [dataclasses.asdict(row) for row in rows]})


def show_rows(console: Console, rows: Rows, *, as_json: bool) -> None:
    """A table of equal rows."""
    if as_json:
        console.print_json(document(rows))
        return
    console.print(" · ".join(f"{k} {v}" for k, v in header().items()), highlight=False)
    table = Table(*(field.name for field in dataclasses.fields(rows[0])), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*map(_told, dataclasses.astuple(row)))
    console.print(table)


def rows_as_markdown(rows: Rows) -> str:
    """Format equal rows as a Markdown table under a line that names the machine."""
    names = [field.name for field in dataclasses.fields(rows[0])]
    lines = [" · ".join(f"{k} {v}" for k, v in header().items()), "", names, ["---"] * len(names)]
    lines += [list(map(_told, dataclasses.astuple(row))) for row in rows]
    return "\n".join(line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines)
