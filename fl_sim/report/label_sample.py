"""Labels of some clients of a run, evenly spaced: a chart of a million clients reads a hundred of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_sim.core.files import read_plain
from fl_sim.report.charts import every_nth
from fl_sim.report.schema import check_counts
from fl_sim.report.summary import Report

LARGE = 1 << 20
"""Bytes of a partition.json from which on its rows are not all read."""
BETWEEN = "], ["


@dataclass(frozen=True)
class LabelSample:
    """Training samples by class of evenly spaced clients.

    Attributes:
        clients: how many there are in all.
        kept: numbers of those that are here.
        rows: for each of those, its samples by class.
        same: equal for runs with equal partitions.
    """

    clients: int
    kept: Sequence[int]
    rows: Sequence[Sequence[int]]
    same: str

    @classmethod
    def of(cls, report: Report) -> LabelSample | None:
        """The sample of a run; None where it did not keep its partition.

        Raises:
            UserError: what it kept is damaged.
        """
        path = report.folder / "partition.json"
        if not path.is_file() or path.stat().st_size < LARGE:
            counts = report.label_counts
            kept = every_nth(len(counts))
            return cls(len(counts), kept, [counts[client] for client in kept], str(counts)) if counts else None
        return cls._of_large(path, report)

    @classmethod
    def _of_large(cls, path: Path, report: Report) -> LabelSample:
        text = read_plain(path).decode(errors="replace")
        rows = text.strip().removeprefix("[[").removesuffix("]]").split(BETWEEN)
        kept = every_nth(len(rows))
        try:
            some = json.loads(f"[[{BETWEEN.join(rows[client] for client in kept)}]]")
        except (ValueError, RecursionError):
            some = report.label_counts  # which complains of it
        checked = check_counts(some, report.folder)
        report.require_clients(len(rows))
        return cls(len(rows), kept, checked, text)
