"""Numbers behind the charts: curves, densities, the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fl_sim.communication.schedule import ROUNDS
from fl_sim.communication.virtual_clock import Link
from fl_sim.report.groups import Group, t_factor
from fl_sim.report.rounds import Floats, Rounds, Series, combined, common
from fl_sim.report.summary import Report

POINTS = 240
"""Points that a curve of the page has at most."""
Axis = Callable[[Report], Series]
"""Run -> position of each round on the x axis."""


def at_round(report: Report) -> Series:
    """The round itself."""
    return report.columns.series("round")


def at_megabytes(report: Report) -> Series:
    """MB of both directions so far."""
    both = [report.columns.series(name) for name in ("uplink_bytes", "downlink_bytes")]
    return combined(both, lambda up, down: (up + down) / 1e6)


def at_clock(report: Report) -> Series:
    """Seconds on the run's own virtual clock."""
    return report.columns.series("simulated_s")


@dataclass(frozen=True)
class BehindLink:
    """Seconds when every client sits behind `link`; of runs in rounds only, because others would have had other steps."""

    link: Link

    def __call__(self, report: Report) -> Series:
        found = report.flows.seconds(self.link) if in_rounds(report) else {}
        return Series.of(np.array(list(found), np.float64), np.array(list(found.values()), np.float64))


def in_rounds(report: Report) -> bool:
    """Whether the server of a run waited for a cohort (`schedule.kind`)."""
    schedule = report.config.get("schedule")
    return not isinstance(schedule, dict) or schedule.get("kind", ROUNDS) == ROUNDS


Value = Callable[[Rounds], Series]
"""Rounds of a run -> the number that is drawn, of those that have it."""


@dataclass(frozen=True)
class Column:
    """`scale` times a column of rounds.jsonl, less another one where it is named."""

    name: str
    less: str | None = None
    scale: float = 1.0

    def __call__(self, rounds: Rounds) -> Series:
        """See `Value`."""
        own = rounds.series(self.name)
        if self.less is None:
            return Series(own.rounds, self.scale * own.values)
        return combined([own, rounds.series(self.less)], lambda first, second: self.scale * (first - second))


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
        kept, every = {0, count - 1}, np.nan_to_num(np.array(self.y))
        for stretch in np.array_split(np.arange(count), (most - 2) // 2):
            values = every[stretch]
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
    found = [value(report.columns) for report in group.reports]
    rounds = common([*places, *found])
    x, _ = _spread([place.at(rounds) for place in places])
    means, reach = _spread([each.at(rounds) for each in found])
    if len(group.reports) == 1:
        return Curve(tuple(x.tolist()), tuple(means.tolist()))
    bounds = (x, means, means - reach, means + reach)
    return Curve(*(tuple(each.tolist()) for each in bounds))


def _spread(values: Sequence[Floats]) -> tuple[Floats, Floats]:
    """(mean, half the 95 % confidence interval) over the seeds, of each round; as `Spread`."""
    mean = sum(values, np.zeros(())) / len(values)
    if len(values) < 2:
        return mean, np.zeros(mean.shape)
    variance = sum(((value - mean) ** 2 for value in values), np.zeros(())) / (len(values) - 1)
    return mean, t_factor(len(values)) * (variance / len(values)) ** 0.5


def accuracy_curve(group: Group, axis: Axis) -> Curve:
    """Test metric of the runs' task, in percent where it is a share, as accuracy is."""
    score = group.reports[0].results.score
    drawn = curve(group, axis, Column(score.name, scale=score.scale))
    return drawn.within(0.0, 100.0) if score.percent else drawn


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, gain) that no other beats: none is at most as dear and at least as good; cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def densities(
    report: Report, prefix: str, places: Sequence[int] | None = None
) -> tuple[list[int], dict[str, list[float | None]]]:
    """(rounds, layer -> density a round) from the columns `<prefix>/<layer>` of rounds.jsonl, at some `places` or all; None = not
    in that round."""
    columns = report.columns
    chosen = range(len(columns)) if places is None else places
    layers = [name for name in columns.names if name.startswith(prefix + "/")]
    rounds = [int(number or 0) for number in columns.at("round", chosen)]
    return rounds, {layer.split("/", 1)[1]: columns.at(layer, chosen) for layer in layers}
