"""`fl-sim watch`, and the same page beside a run: `fl-sim run --watch`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fl_sim.cli.live_server import LiveServer
from fl_sim.cli.live_state import Watch
from fl_sim.cli.screen import console
from fl_sim.core.errors import UserError

LAST_WORD_S = 2.5
"""Seconds that the page of an ended run is still answered: it asks every two seconds."""

PATIENCE = 19
"""Niceness of the process that serves the page: whoever computes on this machine comes first."""


def watch(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or a folder that holds them, for instance runs")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of this machine; 0 = a free one")] = 0,
    parent: Annotated[int | None, typer.Option(hidden=True, help="process to end with")] = None,
) -> None:
    """Show runs as they go in a browser on this machine: progress, curves, bytes, clients, errors. Ends with Ctrl-C.

    The page has a secret address and asks nobody else for anything. Runs that start later appear by themselves.

    Example: fl-sim watch runs
    """
    for place in runs:
        if place.exists() and not place.is_dir():
            raise UserError(f"{place}: not a folder; name run folders, or the folder that holds them")
    try:
        server = LiveServer(Watch([place.resolve() for place in runs]).state, port, parent)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror or error}") from error
    os.nice(PATIENCE)
    with server:
        console.print(f"watch: {server.url}", highlight=False, soft_wrap=True)
        for place in [] if parent else runs:
            if not place.exists():  # a misspelt name would look like a run that is about to start
                console.print(f"watch: {place}: not there yet", highlight=False, markup=False, soft_wrap=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("watch: ended", highlight=False)


@contextmanager
def beside(folder: Path) -> Iterator[None]:
    """`fl-sim watch` in a process of its own, so that a run loses no time to it; it ends with the run, however that ends."""
    command = [sys.executable, "-m", "fl_sim.cli", "watch", str(folder), "--parent", str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
        time.sleep(LAST_WORD_S)
    finally:
        process.terminate()
        process.wait()
