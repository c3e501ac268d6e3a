"""Accuracies and losses by round, of whatever the run recorded: test, validation, training, and the clients' own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fl_sim.report.charts import ROUND, Chart, Figure, Quantity, lines
from fl_sim.report.groups import Group, resolved
from fl_sim.report.measures import metric_axis, score_of
from fl_sim.report.numbers import Column, at_round, curve

CLIENTS = "on each client's own kind of test samples"
Views = Mapping[str, tuple[Quantity, Column]]


def _of_metric(groups: Sequence[Group]) -> Views:
    score = score_of(groups)
    name, unit, scale = score.name, score.unit, score.scale
    return {
        "test": (metric_axis(groups), Column(name, scale=scale)),
        "validation": (metric_axis(groups, "validation"), Column(f"validation_{name}", scale=scale)),
        "clients, mean": (metric_axis(groups, "clients' mean"), Column(f"clients_{name}", scale=scale)),
        "clients, worst": (
            metric_axis(groups, "worst client's"),
            Column(f"clients_{name}_{'min' if score.higher else 'max'}", scale=scale),
        ),
        "clients, lowest tenth": (
            Quantity(f"{name} below which a tenth lie", unit),
            Column(f"clients_{name}_p10", scale=scale),
        ),
        "clients, median": (metric_axis(groups, "clients' median"), Column(f"clients_{name}_p50", scale=scale)),
        "clients, highest tenth": (
            Quantity(f"{name} above which a tenth lie", unit),
            Column(f"clients_{name}_p90", scale=scale),
        ),
    }


IN_NATS = ("classification", "multilabel", "next_token")
"""Tasks whose loss is a cross-entropy; that of any other has no unit that this page would know."""


def _of_loss(groups: Sequence[Group]) -> Views:
    unit = "nats" if all(resolved(group.reports[0]).get("task") in IN_NATS for group in groups) else ""
    return {
        "test": (Quantity("test loss", unit, 3), Column("loss")),
        "validation": (Quantity("validation loss", unit, 3), Column("validation_loss")),
        "training": (Quantity("clients' training loss", unit, 3), Column("train_loss")),
        "clients, mean": (Quantity("clients' mean loss", unit, 3), Column("clients_loss")),
    }


def accuracy_by_round(groups: Sequence[Group], band: str) -> Figure:
    """Test and validation metric, such as accuracy, of the global model, and the clients' where they evaluate it."""
    return _figure(f"{score_of(groups).title} by round", groups, _of_metric(groups), band)


def loss_by_round(groups: Sequence[Group], band: str) -> Figure | None:
    """Losses, as far as the runs recorded them; None without any."""
    figure = _figure("Loss by round", groups, _of_loss(groups), band)
    return figure if figure.views else None


def _figure(title: str, groups: Sequence[Group], wanted: Views, band: str) -> Figure:
    views: dict[str, Chart] = {}
    for name, (quantity, value) in wanted.items():
        most = 100.0 if quantity.unit == "%" else math.inf
        drawn = [curve(group, at_round, value).within(0.0, most) for group in groups]
        if any(each.x for each in drawn):
            views[name] = lines(groups, drawn, ROUND, quantity)
    own = (
        f"Clients: the clients that evaluate in a round, {CLIENTS}. "
        if any("clients," in name for name in views)
        else ""
    )
    train = "Training: mean over the clients' own batches. " if "training" in views else ""
    return Figure(
        title, (band + own + train).strip() or "The global model after each evaluated round.", views, "groups"
    )
