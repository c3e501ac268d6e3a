"""Accuracy against simulated time: the run's own network first, then the nominal links, as curves and as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_sim.communication.virtual_clock import PRESETS
from fl_sim.report.charts import Chart, Figure, Quantity, lines
from fl_sim.report.groups import Group, Spread
from fl_sim.report.measures import level_text, levels, metric_axis, score_of
from fl_sim.report.numbers import Axis, BehindLink, accuracy_curve, at_clock
from fl_sim.report.rounds import Series
from fl_sim.report.summary import Report

OWN = "the run's own network"


def networks(groups: Sequence[Group]) -> dict[str, Axis]:
    """Name -> round -> seconds: the runs' own virtual clock, where one has it, and every nominal link."""
    own: dict[str, Axis] = {OWN: at_clock} if any(_has_clock(r) for group in groups for r in group.reports) else {}
    return own | {name: BehindLink(link) for name, link in PRESETS.items()}


def _has_clock(report: Report) -> bool:
    return len(at_clock(report).rounds) > 0


def by_time(groups: Sequence[Group], band: str) -> Figure:
    """Accuracy by simulated time, one view a network."""
    links = "; ".join(f"{n} {k.down_mbps:g} down, {k.up_mbps:g} up, {k.latency_ms:g} ms" for n, k in PRESETS.items())
    views: dict[str, Chart] = {}
    for name, axis in networks(groups).items():
        words = "simulated time" if axis is at_clock else f"time behind {name}"
        curves = [accuracy_curve(group, axis) for group in groups]
        views[name] = lines(groups, curves, Quantity(words, "s", 1), metric_axis(groups))
    own = "The run's own network is the config's [network], devices' speeds included. " if OWN in views else ""
    clockless = [group.name for group in groups if OWN in views and not all(map(_has_clock, group.reports))]
    without = f"Without one: {', '.join(clockless)}. " if clockless else ""
    caption = (
        f"{band}{own}{without}Under a link's name: the time that the encoded bytes take over it (Mbit/s, one-way latency: "
        f"{links}). Every client has its own link, a round lasts as long as its slowest client, and computing takes no time. "
        "Runs without rounds have no such time."
    )
    return Figure(f"{score_of(groups).title} by simulated time", caption, views, "groups")


def _seconds_to(report: Report, places: Series, level: float) -> float | None:
    """Seconds on an axis of time until the test metric first reached `level`; None where it never did."""
    score = report.results.score
    metric = report.columns.series(score.name)
    reached = metric.rounds[metric.values >= level if score.higher else metric.values <= level]
    known = np.intersect1d(reached, places.rounds)
    return float(places.at(known[:1])[0]) if len(known) else None


def time_to_accuracy(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of seconds to the best levels that any run reached, a row for each run and network."""
    asked = levels(groups)
    rows = [
        [group.name, name, *_times(group, axis, [float(level) for level in asked])]
        for group in groups
        for name, axis in (networks([group]) if asked else {}).items()
    ]
    headings = ["run", "network", *(f"{level_text(groups, level)} [s]" for level in asked)]
    return headings, rows


def _times(group: Group, axis: Axis, asked: Sequence[float]) -> list[str]:
    places = [(report, axis(report)) for report in group.reports]
    return [Spread.of(_seconds_to(*each, level) for each in places).text(1) for level in asked]
