"""Numbers behind the charts: curves, densities, the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fl_sim.communication.schedule import ROUNDS
from fl_sim.communication.virtual_clock import Link
from fl_sim.report.groups import Group, Spread
from fl_sim.report.summary import Report

POINTS = 240
"""Points that a curve of the page has at most."""
Axis = Callable[[Report], Mapping[int, float]]
"""Run -> round -> position on the x axis."""


def at_round(report: Report) -> dict[int, float]:
    """The round itself."""
    return {int(row["round"]): row["round"] for row in report.rounds}


def at_megabytes(report: Report) -> dict[int, float]:
    """MB of both directions so far."""
    return {int(row["round"]): (row["uplink_bytes"] + row["downlink_bytes"]) / 1e6 for row in report.rounds}


def at_clock(report: Report) -> dict[int, float]:
    """Seconds on the run's own virtual clock."""
    return {int(row["round"]): row["simulated_s"] for row in report.rounds if "simulated_s" in row}


@dataclass(frozen=True)
class BehindLink:
    """Seconds when every client sits behind `link`; of runs in rounds only, because others would have had other steps."""

    link: Link

    def __call__(self, report: Report) -> dict[int, float]:
        return report.flows.seconds(self.link) if in_rounds(report) else {}


def in_rounds(report: Report) -> bool:
    """Whether the server of a run waited for a cohort (`schedule.kind`)."""
    schedule = report.config.get("schedule")
    return not isinstance(schedule, dict) or schedule.get("kind", ROUNDS) == ROUNDS


Value = Callable[[Mapping[str, float]], float | None]
"""Line of rounds.jsonl -> the number that is drawn; None = this round has none."""


@dataclass(frozen=True)
class Curve:
    """A number along an axis; `low` and `high` bound the 95 % confidence interval, empty for one seed."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def thinned(self, most: int = POINTS) -> Curve:
        """Keep at most `most` points: of each stretch its lowest and highest, and both ends."""
        count = len(self.x)
        if count <= most:
            return self
        kept = {0, count - 1}
        for stretch in np.array_split(np.arange(count), (most - 2) // 2):
            values = np.nan_to_num(np.array(self.y)[stretch])
            kept |= {int(stretch[values.argmin()]), int(stretch[values.argmax()])}
        chosen = sorted(kept)
        return Curve(
            *(tuple(each[i] for i in chosen) if each else () for each in (self.x, self.y, self.low, self.high))
        )

    def within(self, least: float, most: float) -> Curve:
        """Clip an interval to the range of its number."""
        cut = (tuple(min(most, max(least, v)) for v in bound) for bound in (self.low, self.high))
        return Curve(self.x, self.y, *cut)


def curve(group: Group, axis: Axis, value: Value) -> Curve:
    """The number over the rounds that every seed has it for, means over the seeds on both axes."""
    places = [axis(report) for report in group.reports]
    found = [{int(row["round"]): value(row) for row in report.rounds} for report in group.reports]
    had = [{number for number, v in each.items() if v is not None} for each in found]
    common = sorted(set.intersection(*(set(a) & b for a, b in zip(places, had, strict=True))))
    x = [Spread.of(place[number] for place in places).mean or 0.0 for number in common]
    y = [Spread.of(each[number] for each in found) for number in common]
    means = tuple(spread.mean or 0.0 for spread in y)
    if len(group.reports) == 1:
        return Curve(tuple(x), means)
    reach = [spread.ci or 0.0 for spread in y]
    low = tuple(mean - ci for mean, ci in zip(means, reach, strict=True))
    high = tuple(mean + ci for mean, ci in zip(means, reach, strict=True))
    return Curve(tuple(x), means, low, high)


def accuracy_curve(group: Group, axis: Axis) -> Curve:
    """Test metric of the runs' task, in percent where it is a share, as accuracy is."""
    score = group.reports[0].results.score
    drawn = curve(group, axis, score.of)
    return drawn.within(0.0, 100.0) if score.percent else drawn


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, gain) that no other beats: none is at most as dear and at least as good; cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def densities(report: Report, prefix: str) -> tuple[list[int], dict[str, list[float | None]]]:
    """(rounds, layer -> density a round) from the columns `<prefix>/<layer>` of rounds.jsonl; None = not in that round."""
    layers = list(dict.fromkeys(key for row in report.rounds for key in row if key.startswith(prefix + "/")))
    rounds = [int(row["round"]) for row in report.rounds]
    return rounds, {layer.split("/", 1)[1]: [row.get(layer) for row in report.rounds] for layer in layers}
