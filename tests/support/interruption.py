"""Runs that end before they are done."""

from __future__ import annotations

from dataclasses import dataclass, field


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


@dataclass
class KillAfter:
    """An observer that stops the run once a round is done, or once so many clients of the next have answered."""

    round_number: int
    replies: int = 0
    _rounds: int = 0
    seen: list[int] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Ignore."""

    def reply(self, answered: int, cohort: int) -> None:
        if self._rounds == self.round_number and answered == self.replies:
            raise Killed

    def round(self, row) -> None:
        self._rounds += 1
        self.seen.append(int(row["round"]))
        if self._rounds == self.round_number and self.replies == 0:
            raise Killed
