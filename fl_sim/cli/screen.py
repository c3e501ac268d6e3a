"""The consoles that every command writes to, and the name this program was called by."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

console = Console()
errors = Console(stderr=True, highlight=False)


def wide(columns: int) -> Console:
    """Console on standard output that is at least `columns` characters wide, so that rich does not squeeze a table."""
    return Console(width=max(console.width, columns))


def show(table: Table) -> None:
    """Print a table; on longer lines where its columns do not fit into the terminal, so that no heading or number is cut."""
    wide(_least_width(table)).print(table)


def _least_width(table: Table) -> int:
    """Characters of a table whose columns that do not wrap are whole: each with a space and a divider, and two edges."""
    widths = [
        max(cell_len(str(cell)) for cell in (column.header, *column.cells)) if column.no_wrap else column.min_width or 1
        for column in table.columns
    ]
    return sum(widths) + 2 * len(widths) + 1


def typed() -> str:
    """This program as it was called, so that a command that we show can be pasted."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "fl-sim" and shutil.which("fl-sim") != str(called) else "fl-sim"
