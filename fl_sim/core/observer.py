"""Who watches a run: a display, a tracker, a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Observer(Protocol):
    """What a display hears of a run."""

    def reply(self, answered: int, cohort: int) -> None:
        """One client of the current round has answered."""

    def round(self, row: Mapping[str, float]) -> None:
        """A round is done; `row` is its line of rounds.jsonl."""


class Silent:
    """An observer that shows nothing."""

    def reply(self, answered: int, cohort: int) -> None:
        """Ignore."""

    def round(self, row: Mapping[str, float]) -> None:
        """Ignore."""


SILENT = Silent()
