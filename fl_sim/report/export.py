"""A comparison as text for other programs: CSV, Markdown, LaTeX. The same numbers as the HTML report's.

print(FORMATS["markdown"](grouped(reports)))
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from fl_sim.report.groups import Group
from fl_sim.report.measures import MEASURES, Measure, claims, named, targets
from fl_sim.report.same_data import other_data

LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",  # noqa: RUF001
}


def _sheet(groups: Sequence[Group], chosen: Sequence[Measure]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) for a reader: means with intervals, of the chosen measures, or of all and MB to high accuracies."""
    measures = named(chosen or [*MEASURES, *targets(groups)], groups)
    rows = [[group.name, group.seeds, *(measure.text(group) for measure in measures)] for group in groups]
    return ["run", "seeds", *(measure.heading for measure in measures)], rows


def as_csv(groups: Sequence[Group], chosen: Sequence[Measure] = ()) -> str:
    """For a program: means in full precision, half the 95 % confidence interval beside each; empty = no value."""
    measures = named(chosen or [*MEASURES, *targets(groups), *claims(groups)], groups)
    headings = (name for m in measures for name in (m.heading, f"{m.heading} ci95"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "seeds", *headings])
    for group in groups:
        spreads = [measure.spread(group) for measure in measures]
        writer.writerow([group.name, group.seeds, *(cell for s in spreads for cell in (s.mean, s.ci))])
    return text.getvalue()


def as_markdown(groups: Sequence[Group], chosen: Sequence[Measure] = ()) -> str:
    """A pipe table; below it a line where not all runs are on the same data."""
    headings, rows = _sheet(groups, chosen)
    rule = ["---", *("---:" for _ in headings[1:])]
    table = "".join(f"| {' | '.join(map(_markdown, cells))} |\n" for cells in (headings, rule, *rows))
    said = other_data(report for group in groups for report in group.reports)
    return f"{table}\n{_markdown(said[0].upper() + said[1:])}.\n" if said else table


def _markdown(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def as_latex(groups: Sequence[Group], chosen: Sequence[Measure] = ()) -> str:
    """A `tabular` with rules of the booktabs package; above it a comment where not all runs are on the same data."""
    headings, rows = _sheet(groups, chosen)
    said = other_data(report for group in groups for report in group.reports)
    lines = [
        *([f"% {said}"] if said else []),
        f"\\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        "\\toprule",
        _latex(headings),
        "\\midrule",
    ]
    return "\n".join([*lines, *map(_latex, rows), "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex(cells: Iterable[str]) -> str:
    return " & ".join("".join(LATEX.get(character, character) for character in cell) for cell in cells) + r" \\"


class Format(Protocol):
    """Groups, and the measures to show (none: the usual ones), as text."""

    def __call__(self, groups: Sequence[Group], chosen: Sequence[Measure] = ()) -> str:
        """The text, which ends in a newline."""


FORMATS: Mapping[str, Format] = {
    "csv": as_csv,
    "markdown": as_markdown,
    "latex": as_latex,
}
