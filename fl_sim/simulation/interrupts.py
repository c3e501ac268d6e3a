"""Ctrl-C that nobody swallows.

Python drops a KeyboardInterrupt that is raised in a destructor or in a callback of a weak reference ("Exception ignored
in ..."), and a client's bare `except:` takes it for its own. The run went on then as if nobody had asked it to stop.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from fl_sim.simulation.round_hooks import Row


class Interrupts:
    """A hook that raises an interrupt again after the round in which it was lost.

    Within a `with` block it listens to SIGINT, where that would raise KeyboardInterrupt anyway: not in other threads than
    the main one, not where the program that calls has a handler of its own or ignores the signal.
    """

    def __init__(self) -> None:
        self._heard = self._listens = False

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        self._listens = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._listens:
            signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def round(self, row: Row) -> None:
        """Stop the run if somebody asked for it during the round.

        Raises:
            KeyboardInterrupt: the one that was lost.
        """
        if self._heard:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
        raise KeyboardInterrupt
