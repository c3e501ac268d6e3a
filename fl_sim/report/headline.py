"""The one sentence on top of a report: what was saved, and what it cost in accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from fl_sim.report.groups import Group, Spread
from fl_sim.report.measures import ACCURACY, SAVING, TOTAL, Measure

TOLERATED = 1.0
"""Points of accuracy that a method may lose and still be preferred to a dearer one."""


def _mean(measure: Measure, group: Group) -> float:
    return measure.spread(group).mean or 0.0


def headline(groups: Sequence[Group]) -> str:
    """One sentence; with several groups it compares the thriftiest with the one whose messages are nearest to dense ones.

    The thriftiest is the one of the fewest bytes within `TOLERATED` points of that reference, or of the fewest bytes at
    all where none is.
    """
    reference = min(groups, key=lambda group: abs(_mean(SAVING, group)))
    others = [group for group in groups if group is not reference]
    if not others:
        return _alone(reference)
    close = [g for g in others if _mean(ACCURACY, g) >= _mean(ACCURACY, reference) - TOLERATED]
    best = min(close or others, key=lambda group: _mean(TOTAL, group))
    less = 100 * (1 - _mean(TOTAL, best) / _mean(TOTAL, reference)) if _mean(TOTAL, reference) else 0.0
    change = _change(best, reference)
    points = change.mean or 0.0
    verb = "lost" if points < 0 else "gained"
    spread = "" if change.ci is None else f" ± {change.ci:.2f}"
    seeds = "one seed" if change.seeds == 1 else f"{change.seeds} seeds"
    return (
        f"{best.name} moved {_mean(TOTAL, best):.2f} MB instead of the {_mean(TOTAL, reference):.2f} MB of {reference.name}, "
        f"{abs(less):.1f} % {'less' if less >= 0 else 'more'}, and {verb} {abs(points):.2f}{spread} points of test accuracy "
        f"({_mean(ACCURACY, best):.2f} % instead of {_mean(ACCURACY, reference):.2f} %; {seeds})."
    )


def _alone(group: Group) -> str:
    seeds = "one seed" if len(group.reports) == 1 else f"{len(group.reports)} seeds"
    return (
        f"{group.name} moved {_mean(TOTAL, group):.2f} MB, {_mean(SAVING, group):.1f} % less than the same messages sent dense, "
        f"and reached {ACCURACY.text(group)} % test accuracy ({seeds}); what that saving cost shows beside a dense run."
    )


def _change(best: Group, reference: Group) -> Spread:
    """Difference of the accuracies: seed by seed where both ran the same seeds, which share data and cohorts."""
    score = [{r.summary["seed"]: ACCURACY.of(r) or 0.0 for r in group.reports} for group in (best, reference)]
    common = [seed for seed in score[0] if seed in score[1]]
    if common:
        return Spread.of(score[0][seed] - score[1][seed] for seed in common)
    return Spread.of([_mean(ACCURACY, best) - _mean(ACCURACY, reference)])
