"""Where commands write, and how this program was called."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

console = Console()
errors = Console(stderr=True, highlight=False)


def typed() -> str:
    """This program as it was called, so that a command that we show can be pasted."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "fl-sim" and shutil.which("fl-sim") != str(called) else "fl-sim"
