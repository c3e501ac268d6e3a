"""Draws the map of the packages: a package imports only packages on floors below its own."""

from __future__ import annotations

from svg import Canvas, write

FLOORS = (
    ("cli",),
    ("bench",),
    ("simulation",),
    ("report",),
    ("config", "strategies"),
    ("runtime", "clients"),
    ("training",),
    ("communication", "gating", "sparsity"),
    ("codecs", "models", "data"),
    ("core",),
)
"""From the top to the ground, as `tests/house/test_architecture.py` has them."""
IDEAS = {
    "cli": "the commands",
    "bench": "measurements of fl-sim itself",
    "simulation": "one run from start to resume: loop, engines, checkpoints, sweeps",
    "report": "tables, HTML page, trackers",
    "config": "an experiment as a file",
    "strategies": "the server's side of a method",
    "runtime": "who executes clients: grids, workers, client state",
    "clients": "the client's side of a method",
    "training": "local SGD, losses, optimizers, the client contract",
    "communication": "messages, ledger, clock",
    "gating": "channel gates for each sample",
    "sparsity": "which weights to keep",
    "codecs": "a tensor or mask as bytes",
    "models": "layers, MACs, parameters",
    "data": "sources, partitions, splits",
    "core": "types, errors, seeds, files, kernels; imports nothing of the project",
}
OUTSIDE = ("strategies", "clients")
"""Top-level packages beside `fl_sim`: reached by import path, so that yours are equal to ours."""
ROOF, PITCH, HEIGHT, LEFT, RIGHT = 74, 56, 46, 20, 820


def draw(canvas: Canvas) -> None:
    theme = canvas.theme
    canvas.text(LEFT, 30, "The packages of fl-sim", size=17, bold=True)
    canvas.text(LEFT, 52, "Imports go down, never up or sideways.", fill=theme.muted)
    canvas.rect(RIGHT - 284, 41, 12, 12, theme.box, theme.series[1], radius=2)
    canvas.text(RIGHT, 52, "outside fl_sim/: a package of yours is its equal", fill=theme.muted, anchor="end")
    for floor, names in enumerate(FLOORS):
        top, gap = ROOF + PITCH * floor, 10
        width = (RIGHT - LEFT - gap * (len(names) - 1)) / len(names)
        for place, name in enumerate(names):
            x = LEFT + place * (width + gap)
            stroke = theme.series[1] if name in OUTSIDE else theme.grid
            canvas.rect(x, top, width, HEIGHT, theme.box, stroke, radius=7)
            canvas.text(x + width / 2, top + 20, name, size=14, anchor="middle", bold=True)
            canvas.text(x + width / 2, top + 37, IDEAS[name], size=12, anchor="middle", fill=theme.muted)


if __name__ == "__main__":
    write("packages", 840, ROOF + PITCH * len(FLOORS) + 6, "The packages of fl-sim, from cli at the top to core", draw)
