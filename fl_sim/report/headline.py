"""The one sentence on top of a report: what was saved, and what it cost in accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from fl_sim.report.groups import Group, Spread
from fl_sim.report.measures import LAST, SAVING, TOTAL, Measure, paired, score_of
from fl_sim.report.same_data import same_data
from fl_sim.report.schema import Score
from fl_sim.report.sizes import size

TOLERATED = 1.0
"""Points of accuracy, or percent of a metric that is no share, that a method may lose and still be preferred to a dearer
one."""


def _mean(measure: Measure, group: Group) -> float:
    return measure.spread(group).mean or 0.0


def _size(group: Group) -> str:
    return size(1e6 * _mean(TOTAL, group))


def headline(groups: Sequence[Group]) -> str:
    """Write the headline: one sentence; with several groups it compares the smallest with the one nearest to dense messages.

    Accuracies are means of the last ten rounds. Groups on other data than that reference are left out.

    The thriftiest is the one of the fewest bytes within `TOLERATED` points of that reference, or of the fewest bytes at
    all where none is.
    """
    score = score_of(groups)  # raises where they are measured by several
    reference = min(groups, key=lambda group: abs(_mean(SAVING, group)))
    rest = [group for group in groups if group is not reference]
    others = [group for group in rest if same_data(group.reports[0], reference.reports[0])]
    if not others:
        return _alone(reference)
    wanted = _mean(LAST, reference)
    slack = TOLERATED if score.percent else abs(wanted) * TOLERATED / 100
    close = [g for g in others if (_mean(LAST, g) - wanted) * (1 if score.higher else -1) >= -slack]
    best = min(close or others, key=lambda group: _mean(TOTAL, group))
    less = 100 * (1 - _mean(TOTAL, best) / _mean(TOTAL, reference)) if _mean(TOTAL, reference) else 0.0
    return (
        f"{best.name} encoded {_size(best)} instead of the {_size(reference)} of {reference.name}, "
        f"{abs(less):.1f} % {'less' if less >= 0 else 'more'}, and {_verdict(paired(best, reference), score)} "
        f"({score.text(_mean(LAST, best))} instead of {score.text(_mean(LAST, reference))}, mean of the last ten rounds)."
    )


def _alone(group: Group) -> str:
    score = score_of([group])
    reached = f"{LAST.text(group)} {score.unit}".rstrip() + f" test {score.name}"
    seeds = "one seed" if len(group.reports) == 1 else f"{len(group.reports)} seeds"
    saved = round(_mean(SAVING, group), 1)
    beside = f"{abs(saved)} % {'less' if saved > 0 else 'more'} than" if saved else "as much as"
    cost = "; what that saving cost shows beside a dense run" if saved > 0 else ""
    return (
        f"{group.name} encoded {_size(group)}, {beside} the same messages sent dense, and reached {reached} (mean of the last "
        f"ten rounds, {seeds}){cost}."
    )


def _verdict(change: Spread, score: Score) -> str:
    """Describe a difference of metrics: a gain or a loss only where zero is outside its confidence interval."""
    points, unit = change.mean, " points" if score.percent else ""
    if points is None:
        return f"no seed is common to both, so that their test {score.name} is not compared"
    if change.ci is None:
        return f"its test {score.name} differs by {points:+.2f}{unit}, which one common seed cannot tell from chance"
    told = f"{abs(points):.2f} ± {change.ci:.2f}{unit}{' of' if unit else ' in'} test {score.name} over {change.seeds} seeds"
    if abs(points) <= change.ci:
        return (
            f"no difference in test {score.name} shows: {points:+.2f} ± {change.ci:.2f}{unit} over {change.seeds} seeds"
        )
    return f"{'gained' if (points > 0) is score.higher else 'lost'} {told}"
