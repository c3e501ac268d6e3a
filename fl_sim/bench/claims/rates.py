"""The local learning rate of every arm of a court, chosen by validation under a seed that is not reported.

search = Search(asked, factors=[0.3, 1, 3])
rates = search.chosen(outcomes)          # outcomes of search.experiments
experiments(asked, rates)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fl_sim.bench.claims.trial import Asked, arms, experiment_of
from fl_sim.config.experiment import Experiment
from fl_sim.core.types import UserError
from fl_sim.report import Report
from fl_sim.simulation.sweep import Outcome

SEED = 10
"""Seed of the runs that choose; it must be none of those that are reported."""
LAST = 10
"""Rounds at the end whose evaluations are averaged."""


class Search:
    """The runs that choose learning rates: each arm under each factor of its own rate.

    Args:
        asked: the court.
        factors: of an arm's own local learning rate, above 0.

    Raises:
        UserError: a factor that is not above 0, or `SEED` among the seeds that are reported.
    """

    def __init__(self, asked: Asked, factors: Sequence[float]) -> None:
        if not all(0 < factor < math.inf for factor in factors):
            raise UserError(f"--rates {','.join(f'{factor:g}' for factor in factors)}: must be numbers above 0")
        if SEED in asked.seeds:
            raise UserError(f"--seeds: {SEED} is the seed that chooses learning rates (--rates); report others")
        self.arm: dict[tuple[str, str], str] = {}
        self.experiments: list[Experiment] = []
        for name, tree in arms(asked).items():
            own = experiment_of(asked, name, tree, []).training.lr
            for rate in sorted({float(f"{own * factor:.3g}") for factor in factors}):
                marked = [f"name={asked.task}-{name}-lr{rate:g}", f"seed={SEED}", f"training.lr={rate!r}"]
                self.experiments.append(made := experiment_of(asked, name, tree, marked))
                self.arm[made.name, made.id] = name

    def chosen(self, outcomes: Iterable[Outcome]) -> dict[str, float]:
        """Arm -> the rate of the best validation metric; the smaller one where two are equal.

        Raises:
            RuntimeError: no run of an arm ended.
        """
        best: dict[str, tuple[float, float]] = {}
        for outcome in outcomes:
            if outcome.report is None:
                continue
            name = self.arm[outcome.experiment.name, outcome.experiment.id]
            found = (validated(outcome.report), -outcome.experiment.training.lr)
            best[name] = max(best.get(name, (-math.inf, -math.inf)), found)
        if missing := [name for name in dict.fromkeys(self.arm.values()) if name not in best]:
            raise RuntimeError(f"no learning rate for {', '.join(missing)}: every run that was to choose it failed")
        return {name: -negative for name, (_, negative) in best.items()}


def validated(report: Report) -> float:
    """Mean validation metric of the evaluations of the last ten rounds, larger is better; -inf where it is not finite."""
    score = report.results.score
    rows = [row for row in report.rounds if row["round"] > report.results.rounds - LAST]
    values = [row[key] for row in rows if (key := f"validation_{score.name}") in row]
    mean = math.fsum(values) / len(values) if values else math.nan
    return (mean if score.higher else -mean) if math.isfinite(mean) else -math.inf
