"""A process that ends worker processes when the program that started them was killed, even workers that are stopped.

A worker's own thread ends it as soon as the program is gone (`forkserver.end_with_parent`), but a stopped process runs no
thread. The watchdog also removes the folder of `multiprocessing`'s socket, which a killed program leaves behind.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import signal
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.util import get_temp_dir

from fl_sim.runtime.grids.forkserver import without_main


def own_group() -> None:
    """Give this process a process group of its own, so that it and what it starts can be ended together."""
    with suppress(OSError):  # it leads one already
        os.setpgid(0, 0)


def end_group(process_id: int) -> None:
    """Kill a process and the processes that it started, such as those of its `DataLoader`."""
    for end in (os.killpg, os.kill):  # a process that has only just started leads no group yet
        with suppress(ProcessLookupError, PermissionError):
            end(process_id, signal.SIGKILL)


class Watchdog:
    """Ends the processes that it was told of when this program is gone, however it ended."""

    def __init__(self, context: ForkServerContext) -> None:
        self._pipe, theirs = context.Pipe()
        # A program started by `multiprocessing` shares the folder of the program that started it, which still needs it.
        folder = get_temp_dir() if mp.parent_process() is None else None
        self._process = context.Process(target=_watch, args=(theirs, folder), name="fl_sim-watchdog", daemon=True)
        with without_main():
            self._process.start()
        theirs.close()

    def tell(self, process_ids: Iterable[int]) -> None:
        """These are the processes to end; they take the place of those of the last call."""
        with suppress(OSError):  # somebody killed the watchdog: then there is none
            self._pipe.send(tuple(process_ids))

    def close(self) -> None:
        """End the watchdog; harmless when called twice."""
        if not self._pipe.closed:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process.close()


def _watch(pipe: Connection, folder: str | None) -> None:
    """The life of the watchdog process: remember who is to be ended, until the program is gone; then remove `folder`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    own_group()
    program = mp.parent_process()
    assert program is not None
    watched: tuple[int, ...] = ()
    while program.sentinel not in wait([pipe, program.sentinel]):
        try:
            watched = pipe.recv()
        except (EOFError, OSError):
            wait([program.sentinel])
            break
    for process_id in watched:
        end_group(process_id)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
