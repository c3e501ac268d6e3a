"""Byte budget of a round (`wire.budget`): how many bytes each payload of it may have."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite

from fl_sim.communication.exchange import Frozen
from fl_sim.core.types import UserError

MB = 10**6


@dataclass(frozen=True)
class ByteBudget:
    """Byte budget of a round: chooses a value type for each tensor of each payload, so that all payloads of a round fit.

    Attributes:
        megabytes: MB of 10^6 bytes that the payloads of a round take at most, both directions and all clients together.
        downlink: share of them for what the server sends, between 0 and 1.
    """

    megabytes: float = 10.0
    downlink: float = 0.5

    def __post_init__(self) -> None:
        if not (isfinite(self.megabytes) and self.megabytes > 0):
            raise UserError(f"wire.budget.megabytes = {self.megabytes}: must be above 0")
        if not 0 < self.downlink < 1:
            raise UserError(f"wire.budget.downlink = {self.downlink}: must be above 0 and below 1")

    def split(self, tasks: int, uploads: int) -> Split:
        """Split the bytes of a round evenly over its tasks and over its uploads."""
        whole = int(MB * self.megabytes)
        down = int(whole * self.downlink) // tasks
        return Split(tasks, uploads, max(0, down - Frozen.FORM.size), (whole - tasks * down) // uploads)


@dataclass(frozen=True)
class Split:
    """What each payload of a round may have.

    Attributes:
        tasks: payloads that the server sends in a round, to clients that train and that evaluate.
        uploads: payloads that clients send.
        down, up: bytes of one of them; a task leaves 16 bytes for the name of the frozen weights at a first contact.
    """

    tasks: int
    uploads: int
    down: int
    up: int

    def least(self, down: int, up: int, share: float) -> float:
        """The smallest budget in MB, to 100 bytes, in which payloads of so many bytes fit, with this share for the downlink."""
        tasks, uploads = self.tasks * (down + Frozen.FORM.size), self.uploads * up
        return ceil((max(tasks / share, uploads / (1 - share)) + 2) / 100) / 10_000

    def best_share(self, down: int, up: int) -> float:
        """The share for the downlink, to two digits, with which the smallest budget is smallest."""
        tasks, uploads = self.tasks * (down + Frozen.FORM.size), self.uploads * up
        return min(0.99, max(0.01, round(tasks / (tasks + uploads), 2)))
