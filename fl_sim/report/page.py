"""The HTML report: one self-contained file, no network, plotly inlined once. Jinja2 escapes every string of a run.

write_page([Report.load("runs/a"), Report.load("runs/b")], Path("comparison.html"))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fl_sim.communication.estimates import ESTIMATES, SOURCES
from fl_sim.config.catalogue import first_line
from fl_sim.config.toml import Json
from fl_sim.core.files import write_atomically
from fl_sim.core.types import UserError
from fl_sim.report import figures
from fl_sim.report.bundle import licence, plotly
from fl_sim.report.by_density import by_density
from fl_sim.report.charts import Chart, Figure
from fl_sim.report.disabled import disabled_features
from fl_sim.report.experiment_facts import told_apart
from fl_sim.report.groups import Group, grouped
from fl_sim.report.headline import headline
from fl_sim.report.legends import keys
from fl_sim.report.measures import MEASURES, TOTAL, Measure, claims, named, score_of, targets
from fl_sim.report.overfitting import overfitting
from fl_sim.report.same_data import other_data
from fl_sim.report.small_models import table_of
from fl_sim.report.summary import Report
from fl_sim.report.times import time_to_accuracy

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report.html"
"""The report's file name in a run folder."""
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_report(report: Report) -> Path:
    """Write a run's report.html into its folder, and return the file's path; about 0.1 s for a run of 30 rounds.

    Raises:
        OSError: the folder cannot be written.
        UserError: the run folder is damaged.
    """
    path = report.folder / PAGE
    write_atomically(path, page(grouped([report])).encode())
    return path


def write_page(reports: Sequence[Report], path: Path) -> None:
    """Write the report of one or more runs.

    Raises:
        UserError: the file cannot be written, or a run folder is damaged.
    """
    text = page(grouped(reports))
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def page(groups: Sequence[Group]) -> str:
    """The whole file."""
    from markupsafe import Markup

    shared, differing = told_apart(groups)
    return (
        _environment()
        .get_template("page.html")
        .render(
            groups=groups,
            policy=POLICY,
            score=score_of(groups),
            headline=headline(groups),
            warning=_sentence(other_data(report for group in groups for report in group.reports)),
            shared=shared,
            differing=Sheet(["what", *(group.name for group in groups)], differing),
            measured=_measured(groups),
            times=Sheet(*time_to_accuracy(groups)),
            small=Sheet(*table_of(groups)),
            figures=[(_drawable(figure), keys(figure, groups)) for figure in _figures(groups)],
            targets=_targets(groups),
            formulas=_formulas(groups),
            names=[group.name for group in groups],
            runs=_runs(groups),
            versions=[f"{name} {version}" for name, version in groups[0].reports[0].results.versions.items()],
            css=Markup(_asset("page.css")),
            js=Markup(_asset("page.js")),
            plotly=Markup(plotly()),
            licence=Markup(licence()),
        )
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def card(report: Report) -> str:
    """A run in a few lines of HTML, as a notebook shows its `Report`."""
    group = Group(report.results.name, (report,))
    shown = {"headline": headline([group]), "measured": _measured([group]), "folder": report.folder}
    return _environment().get_template("card.html").render(shown)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here: `import fl_sim` needs no HTML

    made = Environment(
        loader=PackageLoader("fl_sim.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` writes no "<": a script element ends at the first "</script", whatever the quotes around it.
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return made


def _asset(name: str) -> str:
    return files("fl_sim.report").joinpath(name).read_text(encoding="utf-8")


def _figures(groups: Sequence[Group]) -> Iterable[Figure]:
    drawn = [
        *figures.accuracy(groups),
        overfitting(groups),
        figures.bytes_by_part(groups),
        figures.front(groups) if len(groups) > 1 else None,
        by_density(groups),
        figures.layers(groups),
        figures.macs(groups),
        disabled_features(groups),
        figures.labels(groups),
    ]
    return (figure for figure in drawn if figure is not None)


def _drawable(figure: Figure) -> Figure:
    """The figure with six digits a number, and null for what is not finite, as a diverged loss: JSON has no word for it."""
    views: dict[str, Chart] = {}
    for name, view in figure.views.items():
        views[name] = {key: _finite(value) for key, value in view.items()}
    return replace(figure, views=views)


def _finite(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if not isinstance(value, float):
        return value
    short = float(f"{value:.6g}") if math.isfinite(value) else None
    return int(short) if short is not None and short.is_integer() else short


@dataclass(frozen=True)
class Sheet:
    """A table of texts; the first cell of a row names it."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def _measured(groups: Sequence[Group]) -> Sheet:
    measures = named(MEASURES, groups)
    rows = [[group.name, group.seeds, *(measure.text(group) for measure in measures)] for group in groups]
    return Sheet(["run", "seeds", *(measure.heading for measure in measures)], rows)


def _targets(groups: Sequence[Group]) -> Sheet:
    """Empty where no run reached any accuracy of the list."""
    reached = targets(groups)
    rows = [[group.name, *(measure.text(group) for measure in reached)] for group in groups] if reached else []
    return Sheet(["run", *(measure.name for measure in reached)], rows)


@dataclass(frozen=True)
class Formula:
    """A published formula beside the measurement: its sizes by group, what it counts, and where it is from."""

    name: str
    sizes: Sequence[str]
    counts: str
    source: str


def _formulas(groups: Sequence[Group]) -> list[Formula]:
    measured = Formula("measured", [TOTAL.text(group) for group in groups], "Every payload, as encoded.", "")
    return [
        measured,
        *(
            Formula(
                claim.name,
                [_share(claim, group) for group in groups],
                first_line(ESTIMATES.get(claim.name)) if claim.name in ESTIMATES else "A formula of another version.",
                SOURCES.get(claim.name, ""),
            )
            for claim in claims(groups)
        ),
    ]


def _share(claim: Measure, group: Group) -> str:
    size, total = claim.spread(group).mean, TOTAL.spread(group).mean
    return claim.text(group) if not size or not total else f"{size:.3f} ({100 * size / total:.0f} %)"


def _runs(groups: Sequence[Group]) -> Sheet:
    headings = [
        "folder",
        "seed",
        "engine",
        "rounds",
        "ended",
        "clients",
        "parameters",
        "precision",
        "wall time [s]",
        "failed tasks",
    ]
    rows = []
    for report in (report for group in groups for report in group.reports):
        s = report.results
        cells = (
            s.seed,
            s.engine,
            s.rounds,
            s.stopped or "as configured",
            s.num_clients,
            s.params,
            s.precision,
            s.wall_s,
            s.failed,
        )
        rows.append([report.folder.name, *map(str, cells)])
    return Sheet(headings, rows)
