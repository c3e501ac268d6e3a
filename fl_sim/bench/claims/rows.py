"""The rows of a court: what was claimed, what was encoded, why they differ, and what a smaller dense model does with as much."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fl_sim.bench.claims.claim import Claim
from fl_sim.bench.claims.parts import EVALUATION, parts_of
from fl_sim.bench.claims.trial import Case
from fl_sim.report import Report
from fl_sim.report.groups import Group, Spread
from fl_sim.report.measures import TOTAL, paired, score_of
from fl_sim.report.small_models import SLACK, rank

SHOWN = 3
"""Parts that a reason names."""
LEAST = 0.005
"""Share of the bytes below which a part is not named."""
BETTER, WORSE, OPEN, NONE, ONE = "beats it", "is beaten by it", "not separated", "no model is so small", "one seed"


@dataclass(frozen=True)
class Row:
    """One method beside its claim.

    Attributes:
        name: of the method. claim: of its paper. group: its runs.
        formula: how many times fewer bytes than dense FedAvg by what the paper counts, in its direction.
        direction: by all bytes of the paper's direction. total: by all bytes of both directions.
        reason: shares of all bytes that the paper's formula leaves out, the largest first.
        beyond_dense: metric beyond dense FedAvg, seed by seed.
        small: the best smaller dense model of at most `SLACK` times the bytes; None where none is so small.
        beyond_small: metric beyond it, seed by seed.
        stopped: metric of dense FedAvg when it had moved as many bytes; without values where it had not been evaluated yet.
    """

    name: str
    claim: Claim
    group: Group
    formula: Spread
    direction: Spread
    total: Spread
    reason: str
    beyond_dense: Spread
    small: Group | None
    beyond_small: Spread | None
    stopped: Spread


def row_of(case: Case, name: str) -> Row:
    """The row of a method, from the ledgers of its runs."""
    claim, group = case.methods[name]
    small, way = beside(case, group), claim.direction
    return Row(
        name=name,
        claim=claim,
        group=group,
        formula=_ratio(case, group, way, lambda report: _counted(claim, report)),
        direction=_ratio(case, group, way, lambda report: moved(report, way)),
        total=_ratio(case, group, "both", lambda report: moved(report, "both")),
        reason=reason(claim, group),
        beyond_dense=paired(group, case.dense),
        small=small,
        beyond_small=None if small is None else paired(group, small),
        stopped=Spread.of(_stopped(case, report) for report in group.reports),
    )


def moved(report: Report, direction: str) -> int:
    """All payload bytes of a direction, up, down or both; evaluation on clients is left out, as in a saving."""
    ledger, words = report.ledger, ("up", "down") if direction == "both" else (direction,)
    sizes = ledger.total(by=("direction", "phase"))
    return sum(size for (way, phase), size in sizes.items() if way in words and phase != "evaluate")


MOVED = replace(TOTAL, of=lambda report: 1e-6 * moved(report, "both"))
"""MB of both directions, evaluation on clients left out."""


def _counted(claim: Claim, report: Report) -> int:
    """Bytes that the paper's formula counts; all of its direction where it names none."""
    if claim.counts is None:
        return moved(report, claim.direction)
    parts = parts_of(report.ledger)
    return sum(parts[name] for name in claim.counts)


def _ratio(case: Case, group: Group, direction: str, of: Callable[[Report], int]) -> Spread:
    """Dense FedAvg's bytes of a direction over a method's, seed by seed."""
    dense = {report.results.seed: moved(report, direction) for report in case.dense.reports}

    def one(report: Report) -> float | None:
        size, base = of(report), dense.get(report.results.seed)
        return base / size if base and size else None

    return group.spread(one)


def shares(group: Group) -> dict[str, float]:
    """Mean share of each part in all bytes of a group's runs, evaluation on clients left out."""
    found = [parts_of(report.ledger) | {EVALUATION: 0} for report in group.reports]
    return {name: sum(each[name] / (sum(each.values()) or 1) for each in found) / len(found) for name in found[0]}


def reason(claim: Claim, group: Group) -> str:
    """Parts that the paper's formula leaves out, as shares of all bytes, the largest first."""
    left = {name: share for name, share in shares(group).items() if name not in (claim.counts or ())}
    named = sorted(left, key=lambda name: -left[name])[:SHOWN]
    return ", ".join(f"{name} {100 * left[name]:.0f} %" for name in named if left[name] >= LEAST)


def beside(case: Case, group: Group) -> Group | None:
    """The best smaller dense model that moved at most `SLACK` times the bytes.

    By bytes alone: `small_models` leaves out runs that save nothing of their own model, such as one of low-rank factors.
    """
    limit, sign = SLACK * (MOVED.spread(group).mean or 0.0), 1 if score_of([case.dense]).higher else -1
    fitting = [each for each in case.small if (MOVED.spread(each).mean or 0.0) <= limit]
    return max(fitting, key=lambda each: rank(each, sign), default=None)


def verdict(row: Row, *, higher: bool) -> str:
    """Whether a method beats the smaller dense model: only where the interval of their difference excludes 0."""
    spread = row.beyond_small
    if spread is None or spread.mean is None:
        return NONE
    if spread.ci is None:
        return ONE
    if not abs(spread.mean) > spread.ci:
        return OPEN
    return BETTER if (spread.mean > 0) == higher else WORSE


def _stopped(case: Case, report: Report) -> float | None:
    """The metric of the dense run of the same seed at its last evaluation within the bytes of `report`."""
    for dense in case.dense.reports:
        if dense.results.seed == report.results.seed:
            score, limit = dense.results.score, SLACK * moved(report, "both")
            within = [
                row
                for row in dense.rounds
                if score.name in row and row["uplink_bytes"] + row["downlink_bytes"] <= limit
            ]
            return score.scale * within[-1][score.name] if within else None
    return None


def front(groups: list[Group]) -> list[Group]:
    """The groups that no other one beats in both bytes and metric, the cheapest first."""
    sign = 1 if score_of(groups).higher else -1
    best, kept = -math.inf, []
    for group in sorted(groups, key=lambda each: (MOVED.spread(each).mean or 0.0, -rank(each, sign))):
        if (own := rank(group, sign)) > best:
            best = own
            kept.append(group)
    return kept
