"""Numbers behind the charts: curves, traffic by section, link time, the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fl_sim.codecs.sections import BOOKED
from fl_sim.communication.ledger import CODES, WORDS, Ledger
from fl_sim.communication.virtual_clock import Link
from fl_sim.report.groups import Group, Spread
from fl_sim.report.summary import Report

TRAFFIC_KINDS = (*BOOKED, "evaluation", "waste")
"""Sections of the training messages that counted; evaluation traffic; training messages that led to no accepted update."""
SHOWN_WITH = {"config": "auxiliary", "metrics": "auxiliary"}
"""Sections that foreign Flower apps alone have."""


def traffic(ledger: Ledger) -> dict[tuple[str, str], int]:
    """Sum a ledger by (direction, one of `TRAFFIC_KINDS`), in bytes; the sum is every payload byte.

    Waste is what failed, rejected, late or lost clients cost, the models that were sent to them included.
    """
    column = ledger.column
    train, up = column("phase") == CODES["phase"]["train"], column("direction") == CODES["direction"]["up"]
    clients = column("client").astype(np.int64)
    task = column("round").astype(np.int64) * (clients.max(initial=0) + 1) + clients
    answered = np.unique(task[train & up & (column("status") == CODES["status"]["ok"])])
    shown = [TRAFFIC_KINDS.index(SHOWN_WITH.get(section, section)) for section in WORDS["section"]]
    kind = np.where(np.isin(task, answered), np.array(shown)[column("section")], TRAFFIC_KINDS.index("waste"))
    kind = np.where(train, kind, TRAFFIC_KINDS.index("evaluation"))
    size = column("payload_bytes")
    return {
        (direction, name): int(size[(up == (direction == "up")) & (kind == code)].sum())
        for direction in WORDS["direction"]
        for code, name in enumerate(TRAFFIC_KINDS)
    }


def link_time(ledger: Ledger, link: Link) -> dict[int, float]:
    """Round -> seconds since the start when every client sits behind `link`, and only moving bytes takes time.

    A round lasts as long as its slowest client's download and upload; clients do not share a link.
    """
    column = ledger.column
    train = column("phase") == CODES["phase"]["train"]
    clients, sizes = column("client")[train].astype(np.int64), column("payload_bytes")[train].astype(np.int64)
    task = column("round")[train].astype(np.int64) * (clients.max(initial=0) + 1) + clients
    tasks, place = np.unique(task, return_inverse=True)
    seconds = np.zeros(len(tasks))
    for direction, time in (("down", link.down_s), ("up", link.up_s)):
        chosen = column("direction")[train] == CODES["direction"][direction]
        moved = np.zeros(len(tasks), np.int64)
        np.add.at(moved, place[chosen], sizes[chosen])
        happened = np.isin(tasks, task[chosen])  # a client that sent nothing back waits for no link
        distinct, which = np.unique(moved[happened], return_inverse=True)
        seconds[happened] += np.array([time(size) for size in distinct.tolist()])[which] if len(distinct) else 0.0
    rounds, starts = np.unique(tasks // (clients.max(initial=0) + 1), return_index=True)
    slowest = np.maximum.reduceat(seconds, starts) if len(rounds) else seconds
    return dict(zip(rounds.tolist(), np.cumsum(slowest).tolist(), strict=True))


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
    """Seconds when every client sits behind `link`."""

    link: Link

    def __call__(self, report: Report) -> dict[int, float]:
        return link_time(report.ledger, self.link)


Value = Callable[[Mapping[str, float]], float | None]
"""Line of rounds.jsonl -> the number that is drawn; None = this round has none."""


def accuracy(row: Mapping[str, float]) -> float | None:
    """Test accuracy in percent."""
    return 100 * row["accuracy"] if "accuracy" in row else None


@dataclass(frozen=True)
class Curve:
    """A number along an axis; `low` and `high` bound the 95 % confidence interval, empty for one seed."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

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
    """Test accuracy in percent."""
    return curve(group, axis, accuracy).within(0.0, 100.0)


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
