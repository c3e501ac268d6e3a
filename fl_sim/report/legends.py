"""Legends of the report's charts: what each colour, dash and symbol stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fl_sim.report.by_density import families_of
from fl_sim.report.charts import SYMBOLS, TRAFFIC_COLOURS, Figure, Style
from fl_sim.report.groups import Group

DASHES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
"""plotly's names of dashes -> SVG's lengths."""


@dataclass(frozen=True)
class Key:
    """Entry of a legend: a line with its symbol, or a patch of colour and hatching where there is no symbol."""

    name: str
    colour: str
    dashes: str = ""
    symbol: str = ""
    pattern: str = ""


def keys(figure: Figure, groups: Sequence[Group]) -> list[Key]:
    """The entries of a figure's legend; empty where its labels stand in the chart."""
    return LEGENDS[figure.legend](groups)


def _lines(names: Iterable[str]) -> list[Key]:
    styles = ((name, Style(index)) for index, name in enumerate(names))
    return [Key(name, style.colour, DASHES[style.dash], SYMBOLS[style.symbol]) for name, style in styles]


def _traffic(groups: Sequence[Group]) -> list[Key]:
    sizes = [report.flows.parts for group in groups for report in group.reports]
    present = {part for size in sizes for (_, part), count in size.items() if count}
    return [Key(part, colour, pattern=f"hatch-{part}") for part, colour in TRAFFIC_COLOURS.items() if part in present]


LEGENDS: Mapping[str, Callable[[Sequence[Group]], list[Key]]] = {
    "groups": lambda groups: _lines(group.name for group in groups),
    "families": lambda groups: _lines(family.name for family in families_of(groups)),
    "traffic": _traffic,
    "": lambda groups: [],
}
