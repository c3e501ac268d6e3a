"""Observers of a run: displays, trackers, tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Observer(Protocol):
    """Callbacks of a run."""

    def say(self, line: str) -> None:
        """A word about the run, for instance which engine was chosen and why."""

    def reply(self, answered: int, cohort: int) -> None:
        """One client of the current round has answered."""

    def round(self, row: Mapping[str, float]) -> None:
        """A round is over; `row` is its line of rounds.jsonl."""


class Silent:
    """An observer that shows nothing."""

    def say(self, line: str) -> None:
        """Ignore."""

    def reply(self, answered: int, cohort: int) -> None:
        """Ignore."""

    def round(self, row: Mapping[str, float]) -> None:
        """Ignore."""


SILENT = Silent()
"""The default observer."""
