"""The consoles that every command writes to, and the name this program was called by."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

console = Console()
WORD = 40
"""Characters of the longest word that a table in a file keeps whole."""
errors = Console(stderr=True, highlight=False)


def wide(columns: int) -> Console:
    """Console on standard output that is at least `columns` characters wide, so that rich does not squeeze a table."""
    return Console(width=max(console.width, columns))


def show(table: Table) -> None:
    """Print a table; on longer lines where its columns do not fit into the terminal, so that no heading or number is cut.

    Names are broken where a terminal is too narrow for their words; a file or a pipe gets them whole.
    """
    wide(_least_width(table, words=not console.is_terminal)).print(table)


def _least_width(table: Table, *, words: bool) -> int:
    """Characters of a table whose columns that do not wrap are whole: each with a space and a divider, and two edges.

    Args:
        table: the table.
        words: whether the words of the other columns, which are names, are whole too, up to `WORD` characters.
    """
    widths = []
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        longest = max((cell_len(word) for cell in cells for word in cell.split()), default=1)
        wraps = max(column.min_width or 1, min(WORD, longest) if words else 1)
        widths.append(max(map(cell_len, cells)) if column.no_wrap else wraps)
    return sum(widths) + 2 * len(widths) + 1


def typed() -> str:
    """This program as it was called, so that a command that we show can be pasted."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "fl-sim" and shutil.which("fl-sim") != str(called) else "fl-sim"
