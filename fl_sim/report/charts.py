"""A figure as a value, and what all figures share: a palette, names safe for plotly, lines, bars and heat maps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fl_sim.config.toml import Json
from fl_sim.report.groups import Group
from fl_sim.report.numbers import TRAFFIC_KINDS, Curve

Chart = dict[str, Json]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, without yellow and black, which fail on white and on dark paper."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "x": "✖"}
"""Of plotly, and as a character."""
TRAFFIC_COLOURS = dict(
    zip(
        TRAFFIC_KINDS,
        ("#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#6b7280", "#E69F00", "#F0E442"),
        strict=True,
    )
)


@dataclass(frozen=True)
class Style:
    """Style of a group's lines: colour, dash and symbol differ, so that colour is never the only cue."""

    index: int

    @property
    def colour(self) -> str:
        """Of lines and markers."""
        return COLOURS[self.index % len(COLOURS)]

    @property
    def dash(self) -> str:
        """Of lines."""
        return DASHES[(self.index + self.index // len(COLOURS)) % len(DASHES)]

    @property
    def symbol(self) -> str:
        """Of markers."""
        return list(SYMBOLS)[(self.index + self.index // len(COLOURS)) % len(SYMBOLS)]


@dataclass(frozen=True)
class Figure:
    """A chart with one or more views, of which the page shows one at a time.

    Attributes:
        title, caption: plain text.
        views: button's label -> {"data": [...], "layout": {...}}.
        legend: "groups", "families" (of `by_density`), "traffic", or "" where labels stand in the chart.
        height: pixels.
    """

    title: str
    caption: str
    views: Mapping[str, Chart] = field(default_factory=dict)
    legend: str = ""
    height: int = 340


def plain(text: object, *, longest: int = 48) -> str:
    """Text for plotly, which reads tags and entities; long text loses its middle."""
    shown = str(text)
    if len(shown) > longest:
        shown = f"{shown[: longest * 2 // 3]}…{shown[-(longest // 3) :]}"
    return html.escape(shown, quote=False)


def _label(text: str, row: float) -> Chart:
    place: Chart = {"x": 0, "y": row, "xref": "paper", "xanchor": "left", "yanchor": "bottom", "yshift": 13}
    return {**place, "text": text, "showarrow": False, "align": "left"}


def bar(lengths: list[Json], marker: Chart, hover: str) -> Chart:
    """One series of horizontal bars, a row each."""
    rows: list[Json] = [*range(len(lengths))]
    return {"type": "bar", "orientation": "h", "x": lengths, "y": rows, "marker": marker, "hovertemplate": hover}


def bars(data: list[Json], labels: Sequence[str], x_title: str) -> Chart:
    """Horizontal bars whose names stand above them, so that names of any length fit a phone."""
    rows: Chart = {"visible": False, "range": [len(labels) - 0.6, -0.8], "fixedrange": True}
    x: Chart = {"title": {"text": x_title}, "rangemode": "tozero"}
    notes: list[Json] = [_label(label, row) for row, label in enumerate(labels)]
    return {
        "data": data,
        "layout": {"barmode": "stack", "yaxis": rows, "xaxis": x, "annotations": notes, "bargap": 0.55},
    }


def heat(
    x: list[Json], y: list[Json], z: Sequence[Sequence[float | None]], titles: tuple[str, str, str], hover: str
) -> Chart:
    """A heat map from 0 up; `titles` name the columns, the rows and the value."""
    top = max((value for row in z for value in row if value is not None), default=1.0)
    cells: list[Json] = [[*row] for row in z]
    bar: Chart = {"title": {"text": titles[2], "side": "right"}, "thickness": 10, "outlinewidth": 0}
    scale: Chart = {"colorscale": "Cividis", "zmin": 0, "zmax": top, "colorbar": bar}
    trace: Chart = {"type": "heatmap", "x": x, "y": y, "z": cells, **scale}
    axis: Chart = {"title": {"text": titles[1]}, "type": "category", "autorange": "reversed", "automargin": True}
    columns: Chart = {"title": {"text": titles[0]}}
    return {"data": [{**trace, "hovertemplate": hover}], "layout": {"xaxis": columns, "yaxis": axis}}


def lines(
    groups: Sequence[Group], curves: Sequence[Curve], x_title: str, y_title: str, *, scale: str = "linear"
) -> Chart:
    """A line a group, with a band where the curve has one."""
    data: list[Json] = []
    for index, (group, curve) in enumerate(zip(groups, curves, strict=True)):
        style = Style(index)
        if curve.low:
            band: Chart = {"x": [*curve.x, *curve.x[::-1]], "y": [*curve.high, *curve.low[::-1]], "fill": "toself"}
            data.append(
                {**band, "fillcolor": style.colour + "22", "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
            )
        line: Chart = {"color": style.colour, "dash": style.dash, "width": 2.5}
        data.append(
            {
                "x": [*curve.x],
                "y": [*curve.y],
                "name": plain(group.name),
                "mode": "lines+markers",
                "line": line,
                "marker": {"symbol": style.symbol, "size": 7},
            }
        )
    x: Chart = {"title": {"text": x_title}, "type": scale}
    if scale == "linear":
        x["rangemode"] = "tozero"
    return {"data": data, "layout": {"xaxis": x, "yaxis": {"title": {"text": y_title}}}}
