"""Fault tolerance: how long one client may take, and how many of a cohort may fail."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from fl_sim.core.types import UserError

AGAIN_S = 1.0
"""Seconds until a client that swallowed its alarm hears it again."""

LONGEST_S = 1e9
"""Thirty years; the system's timers do not take much more."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Time limit of a client, and how many may fail. Simulated dropout and lateness (`[network]`) are no faults.

    Attributes:
        max_share: share of a cohort that may fail (raise, be rejected, hang or die), from 0 to 1; one more stops the run.
            1 = all but one.
        timeout_s: real seconds that one client may take; unset = no limit.
        node_timeout_s: real seconds that a machine of a Ray cluster may be silent; then its clients run on the others.
    """

    max_share: float = 0.5
    timeout_s: float | None = None
    node_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1:
            raise UserError(f"faults.max_share = {self.max_share}: must be from 0 to 1")
        if self.timeout_s is not None and not 0 < self.timeout_s <= LONGEST_S:
            raise UserError(f"faults.timeout_s = {self.timeout_s}: must be above 0 and at most {LONGEST_S:g}")
        if not 0 < self.node_timeout_s <= LONGEST_S:
            raise UserError(f"faults.node_timeout_s = {self.node_timeout_s}: must be above 0 and at most {LONGEST_S:g}")


class Overdue(BaseException):
    """A client took too long. No `Exception`, so that a client that catches those is interrupted all the same."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `Overdue` in the block once it has taken that long: in Python code and in blocking calls such as `sleep`.

    Again every second while the block goes on, and after it at the latest: Python drops what is raised in a destructor, and
    a client's bare `except:` takes it for its own.

    Raises:
        UserError: not in the main thread of a Unix process, which alone can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        raise UserError("faults.timeout_s on the inline engine works in the main thread only; use engine = 'ray'")
    has_rung = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal has_rung
        has_rung = True
        raise Overdue

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if has_rung:
        raise Overdue
