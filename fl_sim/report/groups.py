"""Runs that differ only by their seed are one group; its numbers are means with 95 % confidence intervals.

>>> Spread.of([0.9, 0.92, 0.94]).text(2)
'0.92 ± 0.05'
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fl_sim.config.experiment import INDIFFERENT, Experiment
from fl_sim.config.toml import Json
from fl_sim.core.errors import UserError
from fl_sim.report.summary import Report
from fl_sim.training.model_file import content_hash

SAME = INDIFFERENT | {"seed"}
"""Config keys in which the runs of a group may differ."""
WEIGHTS = "model.weights"
"""The config key that counts by content: copies of one file start the same experiment."""
DENSITY = "strategy.density"
"""The config key in which the members of a family differ."""


def t_factor(count: int) -> float:
    """Standard errors to either side of the mean of `count` values, at least two, that make its 95 % interval (Student's t)."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975))


@dataclass(frozen=True)
class Spread:
    """A number over the seeds of a group.

    Attributes:
        values: those of the seeds that have one.
        seeds: how many seeds there are.
        mean: of the values; None without any.
        ci: half the width of the 95 % confidence interval of the mean (Student's t); None below two values.
    """

    values: tuple[float, ...]
    seeds: int
    mean: float | None
    ci: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """The spread of one value a seed; None = this seed has none."""
        given = list(values)
        found = tuple(value for value in given if value is not None)
        count = len(found)
        mean = sum(found) / count if count else None
        if mean is None or count < 2:
            return cls(found, len(given), mean, None)
        variance = sum((value - mean) ** 2 for value in found) / (count - 1)
        return cls(found, len(given), mean, t_factor(count) * (variance / count) ** 0.5)

    def text(self, digits: int, *, scale: float = 1.0) -> str:
        """`mean ± ci`, and how many seeds have a value where not all do."""
        if self.mean is None:
            return "–"  # noqa: RUF001
        spread = "" if self.ci is None else f" ± {scale * self.ci:.{digits}f}"
        some = "" if len(self.values) == self.seeds else f" ({len(self.values)} of {self.seeds})"
        return f"{scale * self.mean:.{digits}f}{spread}{some}"


@dataclass(frozen=True)
class Group:
    """A group of runs: one experiment under one or several seeds, in the order of the seeds."""

    name: str
    reports: tuple[Report, ...]

    def spread(self, of: Callable[[Report], float | None]) -> Spread:
        """A number over the seeds."""
        return Spread.of(map(of, self.reports))

    @property
    def seeds(self) -> str:
        """Format the seeds of a group as a text."""
        return ", ".join(str(report.results.seed) for report in self.reports)


def grouped(reports: Sequence[Report]) -> list[Group]:
    """Group runs by name and everything in their config that determines the result, but the seed.

    A seed counts once: a second run of the same experiment adds no evidence. Groups of the same name are told apart by
    the keys in which their configs differ.
    """
    found: dict[tuple[str, str], dict[str, Report]] = {}
    for report in reports:
        key = (report.results.name, json.dumps(_relevant(report), sort_keys=True))
        found.setdefault(key, {}).setdefault(str(report.results.seed), report)
    groups = []
    for (name, settings), by_seed in found.items():
        others = [json.loads(text) for other, text in found if other == name and text != settings]
        ordered = sorted(by_seed.values(), key=lambda r: r.results.seed)
        groups.append(Group(" ".join([name, *_differing(json.loads(settings), others)]), tuple(ordered)))
    return groups


@dataclass(frozen=True)
class Family:
    """Groups that differ in the density they ask for, densest first."""

    name: str
    groups: tuple[Group, ...]


def families(groups: Sequence[Group], of: Callable[[Group], float]) -> list[Family]:
    """Groups of the same name and config but for their density, ordered by `of`; a group alone is no family."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        report = group.reports[0]
        rest = {key: value for key, value in _relevant(report).items() if key != DENSITY}
        found.setdefault((report.results.name, json.dumps(rest, sort_keys=True)), []).append(group)
    made = []
    for (name, settings), members in found.items():
        others = [json.loads(text) for other, text in found if other == name and text != settings]
        ordered = tuple(sorted(members, key=of, reverse=True))
        made.append(Family(" ".join([name, *_differing(json.loads(settings), others)]), ordered))
    return [family for family in made if len(family.groups) > 1]


def resolved(report: Report) -> dict[str, Json]:
    """The run's config by dotted key, with defaults for keys that older runs did not have."""
    return {**defaults(), **dict(flat(report.config))}


def _relevant(report: Report) -> dict[str, Json]:
    given = dict(flat({key: value for key, value in report.config.items() if key not in SAME}))
    if isinstance(path := given.get(WEIGHTS), str):
        given[WEIGHTS] = _content(path)
    return {**defaults(), **given}


@cache
def _content(path: str) -> str:
    """The content of given weights, as a run's id counts them; their path where they are gone."""
    try:
        return content_hash(Path(path))[:12]
    except (UserError, OSError):
        return path


@cache
def defaults() -> Mapping[str, Json]:
    """Defaults for keys that older runs did not have."""
    default = tomllib.loads(Experiment.from_tree({}).to_toml())
    return dict(flat({key: value for key, value in default.items() if key not in SAME}))


def flat(tree: Mapping[str, Json], path: str = "") -> Iterable[tuple[str, Json]]:
    """(dotted key, value) of a nested table."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def _differing(own: Mapping[str, Json], others: Sequence[Mapping[str, Json]]) -> list[str]:
    keys = sorted({*own, *(key for other in others for key in other)})
    return [f"{key}={own.get(key, 'unset')}" for key in keys if any(other.get(key) != own.get(key) for other in others)]
