"""Accuracy against simulated time: the run's own network first, then the nominal links, as curves and as a table."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from fl_sim.communication.virtual_clock import PRESETS
from fl_sim.report.charts import Chart, Figure, Quantity, lines
from fl_sim.report.groups import Group
from fl_sim.report.measures import level_text, levels, metric_axis, score_of
from fl_sim.report.numbers import Axis, BehindLink, accuracy_curve, at_clock
from fl_sim.report.summary import Report

OWN = "the run's own network"


def networks(groups: Sequence[Group]) -> dict[str, Axis]:
    """Name -> round -> seconds: the runs' own virtual clock, where one has it, and every nominal link."""
    own: dict[str, Axis] = {OWN: at_clock} if any(at_clock(r) for group in groups for r in group.reports) else {}
    return own | {name: BehindLink(link) for name, link in PRESETS.items()}


def by_time(groups: Sequence[Group], band: str) -> Figure:
    """Accuracy by simulated time, one view a network."""
    links = "; ".join(f"{n} {k.down_mbps:g} down, {k.up_mbps:g} up, {k.latency_ms:g} ms" for n, k in PRESETS.items())
    views: dict[str, Chart] = {}
    for name, axis in networks(groups).items():
        words = "simulated time" if axis is at_clock else f"time behind {name}"
        curves = [accuracy_curve(group, axis) for group in groups]
        views[name] = lines(groups, curves, Quantity(words, "s", 1), metric_axis(groups))
    own = "The run's own network is the config's [network], devices' speeds included. " if OWN in views else ""
    clockless = [group.name for group in groups if OWN in views and not all(map(at_clock, group.reports))]
    without = f"Without one: {', '.join(clockless)}. " if clockless else ""
    caption = (
        f"{band}{own}{without}Under a link's name: the time that the encoded bytes take over it (Mbit/s, one-way latency: "
        f"{links}). Every client has its own link, a round lasts as long as its slowest client, and computing takes no time. "
        "Runs without rounds have no such time."
    )
    return Figure(f"{score_of(groups).title} by simulated time", caption, views, "groups")


@dataclass(frozen=True)
class SecondsTo:
    """Seconds on an axis of time until the test metric first reached `level`; None where it never did."""

    axis: Axis
    level: float

    def __call__(self, report: Report) -> float | None:
        places, score = self.axis(report), report.results.score
        rows = [row for row in report.rounds if score.name in row]
        better = operator.ge if score.higher else operator.le
        reached = (int(row["round"]) for row in rows if better(row[score.name], self.level))
        return next((places[number] for number in reached if number in places), None)


def time_to_accuracy(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of seconds to the best levels that any run reached, a row for each run and network."""
    asked = levels(groups)
    chosen = [float(level) for level in asked]
    rows = [
        [group.name, name, *(group.spread(SecondsTo(axis, level)).text(1) for level in chosen)]
        for group in groups
        for name, axis in networks([group]).items()
    ]
    headings = ["run", "network", *(f"{level_text(groups, level)} [s]" for level in asked)]
    return headings, rows if chosen else []
