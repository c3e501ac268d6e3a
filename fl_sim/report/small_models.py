"""The small-model question: does a method beat a smaller dense model that moves as many bytes?

Accuracies are those of runs that were given. What a run's bytes would pay for is computed, as a number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from fl_sim.core.errors import UserError
from fl_sim.report.groups import Group, Spread, resolved
from fl_sim.report.measures import LAST, SAVING, TOTAL, paired, score_of
from fl_sim.report.same_data import same_data

NOTHING_LEFT_OUT = 1.0
"""Saving in percent up to which a run counts as dense."""
SLACK = 1.05
"""How many times a run's bytes a smaller dense model may move to be set beside it; what it moves more is in its favour."""
SAME = ("data.source", "task")
"""Config keys that two runs must share, or their accuracies say nothing of each other."""
HEADINGS = ("run", "MB", "parameters for its bytes", "width", "smaller dense run here", "its MB", "beyond it")


@dataclass(frozen=True)
class SmallModel:
    """A group that saves bytes, and a smaller dense model beside it.

    Attributes:
        group: what saves.
        params: parameters of a dense float32 model whose messages, as many as the group's, take its bytes.
        width: the channel multiplier of such a model, where parameters grow with its square.
        measured: of the dense groups of fewer parameters and at most `SLACK` times its bytes, the best; None where there is none.
        beyond: difference of their metrics, seed by seed.
    """

    group: Group
    params: int
    width: float
    measured: Group | None
    beyond: Spread | None


def is_dense(group: Group) -> bool:
    """Whether nothing was left out or rounded: every message was the whole model as float32."""
    saved = [abs(SAVING.of(report) or 0.0) for report in group.reports]
    kept = [min(r.results.density.prunable, r.results.density.uplink_mean) for r in group.reports]
    return max(saved) <= NOTHING_LEFT_OUT and min(kept) >= 1.0


def require_small(groups: Sequence[Group], folders: Sequence[Path]) -> None:
    """Refuse as small models what were no dense runs.

    Raises:
        UserError: names the first.
    """
    given = {folder.resolve() for folder in folders}
    for group in groups:
        for report in group.reports:
            if report.folder.resolve() in given and not is_dense(group):
                raise UserError(
                    f"--small {report.folder}: saved {100 * report.results.saving:.1f} % of its bytes; needed: a run of dense "
                    "float32 messages"
                )


def small_models(groups: Sequence[Group]) -> list[SmallModel]:
    """A row for each group that saves bytes."""
    return [_beside(group, groups) for group in groups if not is_dense(group) and _share(group) < 1]


def _share(group: Group) -> float:
    return 1 - (SAVING.spread(group).mean or 0.0) / 100


def rank(group: Group, sign: int) -> float:
    """The mean metric, higher is better; a diverged run is below all others."""
    mean = LAST.spread(group).mean
    return -math.inf if mean is None or math.isnan(mean) else sign * mean


def _beside(group: Group, groups: Sequence[Group]) -> SmallModel:
    report, sign = group.reports[0], 1 if score_of([group]).higher else -1
    config, bytes_ = resolved(report), TOTAL.spread(group).mean or 0.0
    smaller = [
        other
        for other in groups
        if is_dense(other)
        and other.reports[0].results.params < report.results.params
        and (TOTAL.spread(other).mean or 0.0) <= SLACK * bytes_
        and all(resolved(other.reports[0]).get(key) == config.get(key) for key in SAME)
        and same_data(other.reports[0], report)
    ]
    best = max(smaller, key=lambda other: rank(other, sign), default=None)
    width = config.get("model.width")
    wide = width if isinstance(width, (int, float)) else 1.0
    share = _share(group)
    return SmallModel(
        group,
        round(share * report.results.params),
        wide * share**0.5,
        best,
        None if best is None else paired(group, best),
    )


def table_of(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of `small_models`, as texts."""
    score = score_of(groups)
    rows = []
    for each in small_models(groups):
        beside = ["none", "", ""]
        if each.measured is not None and each.beyond is not None:
            unit = " points" if score.percent else ""
            beside = [each.measured.name, TOTAL.text(each.measured), f"{each.beyond.text(2)}{unit}"]
        rows.append([each.group.name, TOTAL.text(each.group), f"{each.params:,}", f"{each.width:.2f}", *beside])
    return list(HEADINGS), rows


def small_table(groups: Sequence[Group]) -> Table:
    """Table for a terminal."""
    headings, rows = table_of(groups)
    title = "a smaller dense model for the same bytes: computed size, and what was measured"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in headings:
        table.add_column(name, justify="left" if "run" in name else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
