"""Draws accuracy against encoded megabytes from accuracy_by_traffic.csv (made by collect.py)."""

from __future__ import annotations

import csv
from collections import defaultdict
from math import log10

from svg import HERE, Canvas, write

RUNS = {
    "quickstart": "dense FedAvg",
    "digits-adaptive": "adaptive pruning",
    "digits-rate-distortion": "rate-distortion pruning",
    "topk-both-ways": "top-k int4, both ways",
}
LEFT, TOP, RIGHT, BOTTOM = 58, 74, 800, 440
MB_FROM, MB_TO, FLOOR = 0.05, 100.0, 0.0
Curve = list[tuple[float, float, float, float]]
"""Mean MB; mean, lowest and highest accuracy in % over the seeds."""


def curves() -> dict[str, Curve]:
    points: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with (HERE / "accuracy_by_traffic.csv").open() as file:
        for row in csv.DictReader(file):
            points[row["run"]][int(row["round"])].append((int(row["bytes"]) / 1e6, 100 * float(row["accuracy"])))
    found = {}
    for name, rounds in points.items():
        found[name] = [
            (sum(mb for mb, _ in seeds) / len(seeds), sum(a for _, a in seeds) / len(seeds), *_range(seeds))
            for _, seeds in sorted(rounds.items())
        ]
    return found


def _range(seeds: list[tuple[float, float]]) -> tuple[float, float]:
    accuracies = [accuracy for _, accuracy in seeds]
    return min(accuracies), max(accuracies)


def x(mb: float) -> float:
    return LEFT + (RIGHT - LEFT) * log10(mb / MB_FROM) / log10(MB_TO / MB_FROM)


def y(percent: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (max(percent, FLOOR) - FLOOR) / (100 - FLOOR)


def draw(canvas: Canvas) -> None:
    theme = canvas.theme
    canvas.text(LEFT - 40, 28, "Accuracy against encoded megabytes, both directions", size=17, bold=True)
    canvas.text(
        LEFT - 40,
        50,
        "Digits, 20 clients, Dirichlet 0.3, 10 a round, 40 rounds. Line: mean of seeds 0, 1, 2. Band: lowest to highest.",
        fill=theme.muted,
    )
    for percent in range(0, 101, 20):
        canvas.line([(LEFT, y(percent)), (RIGHT, y(percent))], theme.grid)
        canvas.text(LEFT - 8, y(percent) + 4, f"{percent} %", fill=theme.muted, anchor="end", size=12)
    for mb in (0.1, 1, 10, 100):
        canvas.line([(x(mb), BOTTOM), (x(mb), BOTTOM + 5)], theme.muted)
        canvas.text(x(mb), BOTTOM + 20, f"{mb:g} MB", fill=theme.muted, anchor="middle", size=12)
    found = curves()
    for name, colour in zip(RUNS, theme.series, strict=True):
        curve = found[name]
        band = [(x(mb), y(high)) for mb, _, _, high in curve] + [(x(mb), y(low)) for mb, _, low, _ in reversed(curve)]
        canvas.area(band, colour, 0.16)
    for name, colour in zip(RUNS, theme.series, strict=True):
        canvas.line([(x(mb), y(mean)) for mb, mean, _, _ in found[name]], colour, 2.2)
        end = found[name][-1]
        canvas.dot(x(end[0]), y(end[1]), 4.5, colour)
    for place, (name, colour) in enumerate(zip(RUNS, theme.series, strict=True)):
        end = found[name][-1]
        row = 346 + 23 * place
        canvas.dot(LEFT + 20, row - 4, 5, colour)
        canvas.text(
            LEFT + 34,
            row,
            f"{RUNS[name]}: {end[1]:.1f} % ({end[2]:.1f} to {end[3]:.1f}) after {end[0]:.1f} MB",
            size=14,
        )


if __name__ == "__main__":
    write("accuracy_by_traffic", 840, 480, "Test accuracy against encoded megabytes for four methods", draw)
