"""Draws where the bytes of two runs went, by direction and section, from bytes_by_section.csv (made by collect.py)."""

from __future__ import annotations

import csv
from collections import defaultdict

from svg import HERE, Canvas, write

RUNS = {"quickstart": "dense FedAvg", "topk-both-ways": "top-k both ways"}
SECTIONS = {
    "values": "values of weights",
    "mask": "masks",
    "dense": "biases, BatchNorm",
    "other": "BatchNorm statistics, headers, rest",
}
LEFT, WIDTH = 172, 636
Sizes = dict[tuple[str, str], int]


def sizes() -> dict[str, Sizes]:
    found: dict[str, Sizes] = {name: defaultdict(int) for name in RUNS}
    with (HERE / "bytes_by_section.csv").open() as file:
        for row in csv.DictReader(file):
            section = row["section"] if row["section"] in SECTIONS else "other"
            found[row["run"]][row["direction"], section] += int(row["bytes"])
    return found


def bar(canvas: Canvas, top: float, found: Sizes, direction: str, scale: float) -> None:
    """One stacked bar: the sections of one direction, and its total behind it."""
    at, gap = float(LEFT), 1
    for section, colour in zip(SECTIONS, canvas.theme.series, strict=True):
        length = found.get((direction, section), 0) * scale
        if length >= 1:
            canvas.rect(at, top, max(length - gap, 1), 22, colour)
        at += length
    canvas.text(at + 6, top + 16, f"{total(found, direction) / 1e6:.2f} MB", size=13)


def total(found: Sizes, direction: str) -> int:
    return sum(size for (way, _), size in found.items() if way == direction)


def draw(canvas: Canvas) -> None:
    theme, found = canvas.theme, sizes()
    canvas.text(18, 28, "Where the bytes went", size=17, bold=True)
    canvas.text(18, 50, "Digits, 20 clients, 10 a round, 40 rounds, seed 0; from each run's ledger.", fill=theme.muted)
    at = 18.0
    for (section, words), colour in zip(SECTIONS.items(), theme.series, strict=True):
        canvas.rect(at, 66, 12, 12, colour, radius=2)
        canvas.text(at + 18, 77, words)
        at += 44 + 7.2 * len(words) if section != "other" else 0
    same, enlarged = ((WIDTH - 80) / max(total(found[name], way) for way in ("up", "down")) for name in RUNS)
    top = 104.0
    canvas.text(18, top, "On one scale", bold=True)
    for name in RUNS:
        for way in ("up", "down"):
            top += 12 if way == "up" else 26
            canvas.text(LEFT - 10, top + 16, f"{RUNS[name]}, {way}", anchor="end", size=12, fill=theme.muted)
            bar(canvas, top, found[name], way, same)
        top += 22
    top += 34
    canvas.text(18, top, f"Top-k both ways (int4), drawn {enlarged / same:.0f} times as long", bold=True)
    for way in ("up", "down"):
        top += 12 if way == "up" else 26
        canvas.text(LEFT - 10, top + 16, way, anchor="end", size=12, fill=theme.muted)
        bar(canvas, top, found["topk-both-ways"], way, enlarged)


if __name__ == "__main__":
    write(
        "bytes_by_section", 840, 336, "Encoded bytes by direction and section, dense FedAvg and top-k both ways", draw
    )
