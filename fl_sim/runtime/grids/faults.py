"""Fault tolerance: how long one client may take, and how many of a cohort may fail."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from fl_sim.core.types import UserError

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

    Raises:
        UserError: not in the main thread of a Unix process, which alone can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        raise UserError("faults.timeout_s on the inline engine works in the main thread only; use engine = 'ray'")
    before = signal.signal(signal.SIGALRM, _ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _ring(number: int, frame: FrameType | None) -> None:
    raise Overdue
