"""Drawing of a task's metric against bytes, with the line of smaller dense models; SVG, by the standard library alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fl_sim.bench.claims.page import words_of
from fl_sim.bench.claims.rows import front, moved
from fl_sim.bench.claims.trial import Case
from fl_sim.report.groups import Group
from fl_sim.report.measures import LAST

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 860, 540, 70, 50, 70, 120
TEXT, MUTED, GRID, METHOD, SMALL, BEST = "#1f2328", "#59636e", "#d9dee3", "#0072b2", "#c75000", "#00855f"
LINE = 13
"""Height of a label."""
Point = tuple[str, float, float]
"""(name, MB, metric)."""


def draw(case: Case) -> str:
    """The SVG: MB on a logarithmic axis; a dot for each method, a line through the smaller dense models, one for the front."""
    methods = _points([group for _, group in case.methods.values()])
    small = sorted(_points([*case.small, case.dense]), key=lambda point: point[1])
    every = [*methods, *small]
    if not every:
        raise ValueError("nothing to draw: no run has a finite metric")
    best = _points(front(case.groups))
    low, high = min(mb for _, mb, _ in every), max(mb for _, mb, _ in every)
    least, most = min(y for *_, y in every), max(y for *_, y in every)

    def place(mb: float, y: float) -> tuple[float, float]:
        across = math.log(mb / low) / (math.log(high / low) or 1)
        up = (y - least) / ((most - least) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    parts = [_axes(case, (low, high), (least, most))]
    parts.append(_line([place(mb, y) for _, mb, y in small], SMALL, dashed=True))
    parts.append(_line([place(mb, y) for _, mb, y in best], BEST, dashed=False))
    taken: list[tuple[float, float, float]] = []
    for points, colour in ((small, SMALL), (methods, METHOD)):
        for name, mb, y in points:
            at = place(mb, y)
            parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4" fill="{colour}"/>')
            if colour == METHOD or name == case.dense.name:
                beside = _free(taken, at[0] + 6, at[1] - 5, 7 * len(name))
                parts.append(_text(*beside, name, colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _free(taken: list[tuple[float, float, float]], x: float, y: float, width: float) -> tuple[float, float]:
    """A place for a label of `width` near (x, y) that no label in `taken` (x, y, width) covers; it is added to them."""
    for step in range(12):
        place = y + LINE * (step // 2 + step % 2) * (-1 if step % 2 else 1)
        if all(abs(place - other) >= LINE or x + width < start or start + wide < x for start, other, wide in taken):
            break
    taken.append((x, place, width))
    return x, place


def _points(groups: Sequence[Group]) -> list[Point]:
    found = []
    for group in groups:
        mb = 1e-6 * sum(moved(report, "both") for report in group.reports) / len(group.reports)
        metric = LAST.spread(group).mean
        if metric is not None and math.isfinite(metric):
            found.append((group.name, mb, metric))
    return found


def _axes(case: Case, mb: tuple[float, float], metric: tuple[float, float]) -> str:
    bottom = HEIGHT - BOTTOM
    lines = [
        f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="{GRID}"/>',
        _text(LEFT, TOP - 50, f"{case.task}: {words_of(case)}, against MB of both directions, logarithmic", TEXT),
        _text(LEFT, TOP - 34, "blue: methods; orange: dense models by width; green: the front", MUTED),
        _text(8, TOP + 10, f"{metric[1]:.4g}", MUTED),
        _text(8, bottom, f"{metric[0]:.4g}", MUTED),
        _text(LEFT, bottom + 20, f"{mb[0]:.3g} MB", MUTED),
        _text(WIDTH - RIGHT - 40, bottom + 20, f"{mb[1]:.3g} MB", MUTED),
    ]
    return "".join(lines)


def _line(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool) -> str:
    ends = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{ends}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'


def _text(x: float, y: float, words: str, fill: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}">{escape(words)}</text>'
