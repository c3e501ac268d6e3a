"""Accuracy against density and against traffic: one line for runs that differ in nothing but the density they ask for."""

from __future__ import annotations

from collections.abc import Sequence

from fl_sim.config.toml import Json
from fl_sim.report.charts import Chart, Figure, Quantity, Style, plain, tooltip
from fl_sim.report.groups import Family, Group, families
from fl_sim.report.measures import ACCURACY, ALIVE, TOTAL, Measure, metric_axis, score_of


def families_of(groups: Sequence[Group]) -> list[Family]:
    """The lines of the chart."""
    return families(groups, lambda group: ALIVE.spread(group).mean or 0.0)


def by_density(groups: Sequence[Group]) -> Figure | None:
    """Final accuracy by density of the final mask, and by total traffic; None where no runs differ in density alone."""
    found = families_of(groups)
    if not found:
        return None
    shares = sorted({round(ALIVE.spread(group).mean or 0.0, 2) for family in found for group in family.groups})
    ticks: Chart = {"tickvals": [*shares], "ticktext": [f"{share:g}" for share in shares]}
    views = {
        "density": _view(found, ALIVE, Quantity("alive weights", "%"), ticks),
        "traffic": _view(found, TOTAL, Quantity("total traffic", "MB", 3), {"dtick": "D2"}),
    }
    score = score_of(groups)
    caption = (
        f"Final {score.name} of runs that differ in the density they ask for; bars are 95 % confidence intervals where "
        "there are several seeds."
    )
    return Figure(f"{score.title} by density", caption, views, "families")


def _view(found: Sequence[Family], cost: Measure, quantity: Quantity, axis: Chart) -> Chart:
    data: list[Json] = []
    final = metric_axis([group for family in found for group in family.groups], "final test")
    for index, family in enumerate(found):
        style, gains = Style(index), [ACCURACY.spread(group) for group in family.groups]
        reach: list[Json] = [gain.ci or 0.0 for gain in gains]
        line: Chart = {"color": style.colour, "dash": style.dash, "width": 2.5}
        trace: Chart = {
            "x": [cost.spread(group).mean for group in family.groups],
            "y": [gain.mean for gain in gains],
            "mode": "lines+markers",
            "line": line,
            "marker": {"symbol": style.symbol, "size": 8},
            "name": plain(family.name),
            "legendgroup": family.name,
            "hovertemplate": tooltip(family.name, quantity.at("x"), final.at("y")),
        }
        if any(reach):
            trace["error_y"] = {"type": "data", "array": reach, "color": style.colour, "thickness": 1}
        data.append(trace)
    return {
        "data": data,
        "layout": {"xaxis": {"title": quantity.title, **axis, "type": "log"}, "yaxis": {"title": final.title}},
    }
