"""The chart of the clients' over-fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fl_sim.report.charts import ROUND, Chart, Figure, Quantity, lines
from fl_sim.report.groups import Group
from fl_sim.report.numbers import at_round, curve


@dataclass(frozen=True)
class Column:
    """`scale` times a column of rounds.jsonl, less another one where it is named."""

    name: str
    less: str | None = None
    scale: float = 1.0

    def __call__(self, row: Mapping[str, float]) -> float | None:
        if self.name not in row or (self.less is not None and self.less not in row):
            return None
        return self.scale * (row[self.name] - (row[self.less] if self.less is not None else 0.0))


VIEWS: Mapping[str, tuple[Quantity, Column]] = {
    "gap in loss": (Quantity("loss on unseen less seen", "nats", 3), Column("train_unseen_loss", "train_seen_loss")),
    "gap in accuracy": (
        Quantity("accuracy on seen less unseen", "points"),
        Column("train_seen_accuracy", "train_unseen_accuracy", 100),
    ),
    "accuracy on seen": (Quantity("accuracy on seen", "%"), Column("train_seen_accuracy", scale=100)),
    "accuracy on unseen": (Quantity("accuracy on unseen", "%"), Column("train_unseen_accuracy", scale=100)),
}


def overfitting(groups: Sequence[Group]) -> Figure | None:
    """Over-fitting: accuracy on clients' own samples beside test samples of their kind; None where no run measured it."""
    views: dict[str, Chart] = {}
    for name, (quantity, value) in VIEWS.items():
        drawn = [curve(group, at_round, value) for group in groups]
        if any(line.x for line in drawn):
            views[name] = lines(groups, drawn, ROUND, quantity)
    caption = (
        "Each client's model right after its training: samples that it was trained on (seen) beside test samples in the "
        "proportions of its labels (unseen); means over the clients of a round."
    )
    return Figure("Over-fitting of the clients", caption, views, "groups") if views else None
