"""Draws one federated round: what the server and a client do, and what the ledger sees."""

from __future__ import annotations

from svg import Canvas, write

SERVER, CLIENT = 30, 600
BOX = 210


def box(canvas: Canvas, x: float, y: float, name: str, words: str, colour: str = "") -> None:
    theme = canvas.theme
    canvas.rect(x, y, BOX, 54, theme.box, colour or theme.grid, radius=8)
    canvas.text(x + BOX / 2, y + 23, name, size=14, anchor="middle", bold=True)
    canvas.text(x + BOX / 2, y + 42, words, size=12, anchor="middle", fill=theme.muted)


def draw(canvas: Canvas) -> None:
    theme = canvas.theme
    down, up = theme.series[0], theme.series[1]
    canvas.text(SERVER, 32, "Server", size=17, bold=True)
    canvas.text(CLIENT + BOX, 32, "Each client of the cohort", size=17, bold=True, anchor="end")
    boxes = (
        (SERVER, 50, "Cohort", "drawn from (seed, round)"),
        (SERVER, 134, "Encode the model", "whole, masked or as a change"),
        (CLIENT, 134, "Decode the task", "checked against the schema"),
        (CLIENT, 218, "client(task, context)", "local SGD, or your function"),
        (CLIENT, 302, "Encode the update", "values, mask, BatchNorm, header"),
        (SERVER, 302, "Decode and aggregate", "in a fixed order, float64 sums"),
        (SERVER, 386, "Server step, mask rule", "optimizer, pruning"),
        (SERVER, 470, "Evaluate, checkpoint", "test set; resumes bit for bit"),
    )
    for x, y, name, words in boxes:
        box(canvas, x, y, name, words)
    middle = SERVER + BOX / 2, CLIENT + BOX / 2
    for top in (104, 356, 440):
        canvas.line([(middle[0], top), (middle[0], top + 29)], theme.muted, 1.5, arrow=True)
    for top in (188, 272):
        canvas.line([(middle[1], top), (middle[1], top + 29)], theme.muted, 1.5, arrow=True)
    for y, colour, words, ends in (
        (161, down, "payload down", (SERVER + BOX, CLIENT - 2)),
        (329, up, "payload up", (CLIENT, SERVER + BOX + 2)),
    ):
        canvas.line([(ends[0], y), (ends[1], y)], colour, 2.5, arrow=True)
        canvas.text(CLIENT - 14, y - 9, words, size=13, anchor="end")
    canvas.rect(345, 218, 150, 54, theme.box, theme.series[2], radius=8)
    canvas.text(420, 241, "Ledger", size=14, anchor="middle", bold=True)
    canvas.text(420, 260, "len(bytes) by section", size=12, anchor="middle", fill=theme.muted)
    canvas.line([(420, 163), (420, 215)], theme.muted, 1.5, arrow=True)
    canvas.line([(420, 327), (420, 275)], theme.muted, 1.5, arrow=True)
    canvas.line([(SERVER, 497), (14, 497), (14, 77), (SERVER - 2, 77)], theme.muted, 1.5, arrow=True)
    canvas.text(CLIENT + BOX, 455, "After the last round: config.toml, rounds.jsonl,", anchor="end", fill=theme.muted)
    canvas.text(
        CLIENT + BOX,
        475,
        "ledger.parquet, summary.json, model.safetensors, report.html",
        anchor="end",
        fill=theme.muted,
    )


if __name__ == "__main__":
    write("one_round", 840, 545, "One federated round, from the cohort to the evaluation", draw)
