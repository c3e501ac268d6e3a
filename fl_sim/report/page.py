"""One self-contained HTML file: no network, no font, no image; plotly inlined once. Every string of a run is escaped.

write_page([Report.load("runs/a"), Report.load("runs/b")], Path("comparison.html"))
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from fl_sim.core.files import write_atomically
from fl_sim.core.types import UserError
from fl_sim.report import figures
from fl_sim.report.by_density import by_density, families_of
from fl_sim.report.charts import PART_COLOURS, SYMBOLS, Figure, Style
from fl_sim.report.disabled import disabled_features
from fl_sim.report.groups import Group, grouped
from fl_sim.report.headline import headline
from fl_sim.report.measures import MEASURES, TOTAL, Measure, claims, targets
from fl_sim.report.numbers import traffic
from fl_sim.report.overfitting import overfitting
from fl_sim.report.summary import Report

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
NOTE = (
    "All sizes are lengths of payloads that were encoded and moved, in both directions, masks and headers included. "
    "Saving is against the same messages sent as dense float32. Sent: prunable values in an upload; alive: prunable "
    "weights under the final mask. MB = 10^6 bytes. ± is half a 95 % confidence interval over the seeds (Student's t)."
)


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
    title = f"fl-sim: {', '.join(group.name for group in groups)}"
    drawn: list[Figure | None] = [
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
    body = [
        f'<h1>fl-sim</h1><p class="headline">{_escape(headline(groups))}</p>',
        _section("Measured", NOTE, _table(["run", "seeds", *(m.heading for m in MEASURES)], _measured(groups))),
        *(_figure(figure, groups) for figure in drawn if figure is not None),
        _to_target(groups),
        _estimates(groups),
        _runs(groups),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{_escape(title)}</title><style>{_asset('page.css')}</style></head>\n<body><main>{''.join(body)}</main>\n"
        f"<script>{_plotly()}</script>\n<script>{_asset('page.js')}</script></body></html>\n"
    )


def _escape(text: object) -> str:
    return html.escape(str(text))


def _asset(name: str) -> str:
    return files("fl_sim.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    # The file, not plotly's Python interface: charts here are plain JSON, and importing plotly takes longer than a report.
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def _section(title: str, caption: str, content: str) -> str:
    return f"<section><h2>{_escape(title)}</h2><p>{_escape(caption)}</p>{content}</section>"


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_escape(h)}</th>' for h in headings)
    body = "".join(
        f'<tr><th scope="row">{_escape(first)}</th>{"".join(f"<td>{_escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _measured(groups: Sequence[Group]) -> list[list[str]]:
    return [[group.name, group.seeds, *(measure.text(group) for measure in MEASURES)] for group in groups]


def _to_target(groups: Sequence[Group]) -> str:
    wanted = targets(groups)
    if not wanted:
        return ""
    rows = [[group.name, *(measure.text(group) for measure in wanted)] for group in groups]
    return _section(
        "MB to reach a test accuracy",
        "Both directions, until the first evaluation at or above it; a dash where no seed got there, and how many seeds did "
        "where not all.",
        _table(["run", *(measure.name for measure in wanted)], rows),
    )


def _estimates(groups: Sequence[Group]) -> str:
    measured = replace(TOTAL, name="measured")
    rows = [[claim.name, *(_share(claim, group) for group in groups)] for claim in (measured, *claims(groups))]
    return _section(
        "Estimates of published formulas",
        "MB that each formula would have claimed for the training messages, and its share of the measured total. Shown "
        "beside the measurement, never instead of it.",
        _table(["formula", *(group.name for group in groups)], rows),
    )


def _share(claim: Measure, group: Group) -> str:
    size, total = claim.spread(group).mean, TOTAL.spread(group).mean
    return claim.text(group) if not size or not total else f"{size:.3f} ({100 * size / total:.0f} %)"


def _runs(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        for report in group.reports:
            s = report.results
            cells = (s.seed, s.engine, s.rounds, s.num_clients, s.params, s.precision, s.wall_s, s.failed)
            rows.append([report.folder.name, *map(str, cells)])
    headings = [
        "folder",
        "seed",
        "engine",
        "rounds",
        "clients",
        "parameters",
        "precision",
        "wall time [s]",
        "failed tasks",
    ]
    said = ", ".join(f"{k} {v}" for k, v in groups[0].reports[0].results.versions.items())
    return _section("Runs", f"Versions of the first: {said}.", _table(headings, rows))


def _figure(figure: Figure, groups: Sequence[Group]) -> str:
    views = list(figure.views.items())
    buttons = "".join(
        f'<button type="button" aria-pressed="{"false" if i else "true"}">{_escape(name)}</button>'
        for i, (name, _) in enumerate(views)
    )
    chooser = f'<div class="views">{buttons}</div>' if len(views) > 1 else ""
    # A script element ends at the first "</script", whatever the quotes around it: no "<" leaves here.
    data = json.dumps([view for _, view in views], separators=(",", ":")).replace("<", "\\u003c")
    single = f" ({_escape(views[0][0])})" if len(views) == 1 and views[0][0] else ""
    return (
        f'<section class="figure"><h2>{_escape(figure.title)}{single}</h2><p>{_escape(figure.caption)}</p>'
        f"{LEGENDS[figure.legend](groups)}{chooser}"
        f'<div class="chart" style="height:{figure.height}px" role="img" aria-label="{_escape(figure.title)}"></div>'
        f'<script type="application/json">{data}</script></section>'
    )


def _group_legend(groups: Sequence[Group]) -> str:
    return _line_legend(group.name for group in groups)


def _family_legend(groups: Sequence[Group]) -> str:
    return _line_legend(family.name for family in families_of(groups))


def _line_legend(names: Iterable[str]) -> str:
    dashes = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
    keys = []
    for index, name in enumerate(names):
        style = Style(index)
        line = f'<line x1="1" y1="7" x2="39" y2="7" stroke="{style.colour}" stroke-dasharray="{dashes[style.dash]}"/>'
        mark = f'<text x="20" y="12" text-anchor="middle" fill="{style.colour}">{SYMBOLS[style.symbol]}</text>'
        keys.append(f'<li><svg width="40" height="14" aria-hidden="true">{line}{mark}</svg>{_escape(name)}</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _part_legend(groups: Sequence[Group]) -> str:
    sizes = [traffic(report.ledger) for group in groups for report in group.reports]
    present = {part for size in sizes for (_, part), count in size.items() if count}
    shown = ((part, colour) for part, colour in PART_COLOURS.items() if part in present)
    keys = (f'<li><i class="{part}" style="background-color:{colour}"></i>{part}</li>' for part, colour in shown)
    return f'<ul class="legend">{"".join(keys)}</ul>'


LEGENDS: Mapping[str, Callable[[Sequence[Group]], str]] = {
    "groups": _group_legend,
    "families": _family_legend,
    "parts": _part_legend,
    "": lambda groups: "",
}
