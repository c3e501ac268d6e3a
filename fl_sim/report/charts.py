"""A figure as a value, and what all figures share: a palette, names safe for plotly, lines, bars and heat maps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fl_sim.config.toml import Json
from fl_sim.report.flows import TRAFFIC_KINDS
from fl_sim.report.groups import Group
from fl_sim.report.numbers import Curve

Chart = dict[str, Json]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, without yellow and black, which fail on white and on dark paper."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "x": "✖"}
"""Of plotly, and as a character."""
TRAFFIC_COLOURS = dict(
    zip(
        TRAFFIC_KINDS,
        ("#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#6b7280", "#882255", "#E69F00", "#F0E442"),
        strict=True,
    )
)
PATTERNS = dict(zip(TRAFFIC_KINDS, ("", ".", "/", "x", "-", "+", "/", "|", "\\"), strict=True))
"""Part -> plotly's name of its hatching: colour is never the only cue."""
COLUMNS = 160
"""Columns that a heat map has at most."""
MARKERS = 24
"""Markers that a curve shows at most; its line has all points."""


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
class Quantity:
    """What an axis shows, in words, with its unit and the decimals of a tooltip."""

    words: str
    unit: str = ""
    digits: int = 2

    @property
    def title(self) -> Chart:
        """Title of an axis: `test accuracy [%]`."""
        return {"text": f"{self.words} [{self.unit}]" if self.unit else self.words}

    def at(self, axis: str) -> str:
        """Tooltip text of the value on an axis of plotly, "x" or "y": `test accuracy: 83.29 %`."""
        return f"{self.words}: {self.value(axis)}"

    def value(self, name: str) -> str:
        """A value of plotly's with its unit."""
        return f"%{{{name}:.{self.digits}f}}{f' {self.unit}' if self.unit else ''}"


ROUND = Quantity("round", digits=0)


def tooltip(name: str, *lines: str) -> str:
    """Tooltip of a trace: its name in bold, then a line each; `name` is not yet escaped."""
    return "<br>".join([f"<b>{plain(name)}</b>", *lines]) + "<extra></extra>"


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


def bar(name: str, lengths: list[Json], marker: Chart, hover: str) -> Chart:
    """One series of horizontal bars, a row each."""
    rows: list[Json] = [*range(len(lengths))]
    series: Chart = {"name": plain(name), "legendgroup": name, "marker": marker, "hovertemplate": hover}
    return {"type": "bar", "orientation": "h", "x": lengths, "y": rows, **series}


def bars(data: Sequence[Chart], labels: Sequence[str], x_title: str) -> Chart:
    """Horizontal bars whose names stand above them, so that names of any length fit a phone."""
    rows: Chart = {"visible": False, "range": [len(labels) - 0.6, -0.8], "fixedrange": True}
    x: Chart = {"title": {"text": x_title}, "rangemode": "tozero"}
    notes: list[Json] = [_label(label, row) for row, label in enumerate(labels)]
    return {
        "data": [{**series, "customdata": [*labels]} for series in data],
        "layout": {"barmode": "stack", "yaxis": rows, "xaxis": x, "annotations": notes, "bargap": 0.55},
    }


def every_nth(count: int, most: int = COLUMNS) -> list[int]:
    """Evenly spaced places of `count`, at most `most`, with the first and the last."""
    if count <= most:
        return [*range(count)]
    return [place * (count - 1) // (most - 1) for place in range(most)]


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
    groups: Sequence[Group], curves: Sequence[Curve], x: Quantity, y: Quantity, *, scale: str = "linear"
) -> Chart:
    """A line a group, with a band where the curve has one."""
    bands: list[Json] = []
    data: list[Json] = []
    for index, (group, whole) in enumerate(zip(groups, curves, strict=True)):
        style, curve = Style(index), whole.thinned()
        if curve.low:
            bands.append(_band(curve, style, group.name))
        interval = [f"95 % interval: {y.value('customdata[0]')} to {y.value('customdata[1]')}"] if curve.low else []
        line: Chart = {"color": style.colour, "dash": style.dash, "width": 2.5}
        marker: Chart = {"symbol": style.symbol, "size": 7, "maxdisplayed": MARKERS}
        trace: Chart = {
            "x": [*curve.x],
            "y": [*curve.y],
            "name": plain(group.name),
            "legendgroup": group.name,
            "mode": "lines+markers",
            "line": line,
            "marker": marker,
            "hovertemplate": tooltip(group.name, x.at("x"), y.at("y"), *interval),
        }
        if curve.low:
            trace["customdata"] = [[low, high] for low, high in zip(curve.low, curve.high, strict=True)]
        data.append(trace)
    axis: Chart = {"title": x.title, "type": scale}
    if scale == "linear":
        axis["rangemode"] = "tozero"
    return {"data": [*bands, *data], "layout": {"xaxis": axis, "yaxis": {"title": y.title}}}


def _band(curve: Curve, style: Style, name: str) -> Chart:
    shape: Chart = {"x": [*curve.x, *curve.x[::-1]], "y": [*curve.high, *curve.low[::-1]], "fill": "toself"}
    drawn: Chart = {"fillcolor": style.colour + "22", "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
    return {**shape, **drawn, "legendgroup": name, "showlegend": False}
