"""Writes small SVG drawings, each in a light and a dark form, with the standard library alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of one form. `series` are four colours that stay apart for colour-blind readers (after Okabe and Ito)."""

    surface: str
    text: str
    muted: str
    grid: str
    box: str
    series: tuple[str, str, str, str]


THEMES: Mapping[str, Theme] = {
    "light": Theme("#ffffff", "#1f2328", "#59636e", "#d9dee3", "#f3f5f7", ("#0072b2", "#c75000", "#00855f", "#a8478a")),
    "dark": Theme("#0d1117", "#e6edf3", "#9198a1", "#30363d", "#181e26", ("#56b4e9", "#f0a030", "#2fc597", "#e59bc6")),
}


@dataclass
class Canvas:
    """Collects the elements of one drawing; coordinates are pixels from the top left corner."""

    width: int
    height: int
    theme: Theme
    title: str
    parts: list[str] = field(default_factory=list)

    def rect(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none", radius: float = 0) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 13,
        fill: str = "",
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill or self.theme.text}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def line(self, points: list[tuple[float, float]], stroke: str, width: float = 1, *, arrow: bool = False) -> None:
        ends = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        head = ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(
            f'<polyline points="{ends}" fill="none" stroke="{stroke}" stroke-width="{width}" stroke-linejoin="round"{head}/>'
        )

    def area(self, points: list[tuple[float, float]], fill: str, opacity: float) -> None:
        ends = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon points="{ends}" fill="{fill}" fill-opacity="{opacity}"/>')

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"/>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="{FONT}">\n<title>{escape(self.title)}</title>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="10" markerHeight="10" '
            'markerUnits="userSpaceOnUse" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{self.theme.muted}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" fill="{self.theme.surface}"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def write(name: str, width: int, height: int, title: str, draw: Callable[[Canvas], None]) -> None:
    """Write `name-light.svg` and `name-dark.svg` into the folder that the command line names, or beside this file."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for form, theme in THEMES.items():
        canvas = Canvas(width, height, theme, title)
        draw(canvas)
        (folder / f"{name}-{form}.svg").write_text(canvas.svg(), encoding="utf-8")
