"""Fork server: worker processes are forked off a process that has imported everything and done nothing else.

That process starts them in milliseconds, and it has no threads and no GPU context that a fork would break. It imports only
what the standard library needs, so that a program may start it before its own imports.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from types import ModuleType

from fl_sim.runtime.grids.socket_folder import settle_socket_folder

PRELOAD = ["fl_sim.simulation.client_side", "fl_sim.runtime.grids.workers"]


def prepare() -> ForkServerContext:
    """Start that process unless it runs; it ends with this one. Returns without waiting for its imports.

    Raises:
        ValueError: this system cannot fork.
        UserError: sockets can be made neither in TMPDIR nor in /tmp.
    """
    settle_socket_folder()
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    return context


@contextmanager
def without_main() -> Iterator[None]:
    """Hide the program's own script while a process starts, which would run it a second time for nothing."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def end_with_parent() -> None:
    """From now on this worker process ends when the program does, killed or not, whatever its client is at.

    It takes its process group with it: it leads one of its own (`watchdog.own_group`), with what its clients started.
    """
    parent = mp.parent_process()
    if parent is None:
        return
    gone = parent.sentinel

    def watch() -> None:
        wait([gone])
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="fl_sim-watch", daemon=True).start()
