"""The consoles that every command writes to, and the name this program was called by."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

console = Console()
errors = Console(stderr=True, highlight=False)


def wide(columns: int) -> Console:
    """Console on standard output that is at least `columns` characters wide, so that rich does not squeeze a table."""
    return Console(width=max(console.width, columns))


def typed() -> str:
    """This program as it was called, so that a command that we show can be pasted."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "fl-sim" and shutil.which("fl-sim") != str(called) else "fl-sim"
