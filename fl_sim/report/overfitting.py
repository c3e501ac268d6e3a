"""The chart of the clients' over-fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fl_sim.report.charts import ROUND, Chart, Figure, Quantity, lines
from fl_sim.report.groups import Group
from fl_sim.report.measures import score_of
from fl_sim.report.numbers import Column, at_round, curve
from fl_sim.report.schema import Score


def _views(score: Score) -> Mapping[str, tuple[Quantity, Column]]:
    name, unit, scale = score.name, score.unit, score.scale
    seen, unseen = f"train_seen_{name}", f"train_unseen_{name}"
    return {
        "gap in loss": (
            Quantity("loss on unseen less seen", "nats" if score.percent else "", 3),
            Column("train_unseen_loss", "train_seen_loss"),
        ),
        f"gap in {name}": (
            Quantity(f"{name} on seen less unseen", "points" if score.percent else ""),
            Column(seen, unseen, scale),
        ),
        f"{name} on seen": (Quantity(f"{name} on seen", unit), Column(seen, scale=scale)),
        f"{name} on unseen": (Quantity(f"{name} on unseen", unit), Column(unseen, scale=scale)),
    }


def overfitting(groups: Sequence[Group]) -> Figure | None:
    """Over-fitting: the task's metric on clients' own samples beside test samples of their kind; None where no run measured it."""
    views: dict[str, Chart] = {}
    for name, (quantity, value) in _views(score_of(groups)).items():
        drawn = [curve(group, at_round, value) for group in groups]
        if any(line.x for line in drawn):
            views[name] = lines(groups, drawn, ROUND, quantity)
    caption = (
        "Each client's model right after its training: samples that it was trained on (seen) beside test samples in the "
        "proportions of its labels (unseen); means over the clients of a round."
    )
    return Figure("Over-fitting of the clients", caption, views, "groups") if views else None
