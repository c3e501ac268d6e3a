"""A finished run in ten lines: what it was, what it reached, what it moved and saved, against what, and what is not counted."""

from __future__ import annotations

from fl_sim.report.experiment_facts import facts
from fl_sim.report.schema import Score
from fl_sim.report.summary import Report


def explanation(report: Report) -> list[str]:
    """Ten lines of plain text, each starting with what it is about.

    Raises:
        UserError: a file of the run folder is damaged.
    """
    r, told = report.results, facts(report)
    return [
        f"run        {r.name} ({r.id}), seed {r.seed}: {told['cohort']}, engine {r.engine}, {r.wall_s:.1f} s",
        f"data       {told['data']}; {told['partition']}; hash {told['data hash']}",
        f"model      {told['model']}",
        f"clients    {told['client']}; {told['training']}; code {told['code']}",
        f"server     {told['strategy']}; {told['codecs']}; {told['network']}",
        f"{r.score.name:<10} {_told(r.score, r.score.final)} on the test set after the last round, "
        f"{_told(r.score, r.score.last10_mean)} mean of the last ten rounds",
        f"moved      {_mb(r.total_bytes)} MB as encoded: {_mb(r.uplink_bytes)} up, {_mb(r.downlink_bytes)} down"
        f"{_of_that(report)}",
        f"saved      {_saved(report)}",
        f"against    the same training messages, each sent as a dense float32 model: {_mb(r.dense_total_bytes)} MB. No other "
        "run: one may need other rounds for the same accuracy; `fl-sim compare --baseline` tells",
        f"not in it  {_left_out(report)}HTTP and TLS; Flower's framing (its own count: {_mb(r.protocol_bytes)} MB); "
        "energy; speed-up of masked layers (MACs are counted, not timed)",
    ]


def _told(score: Score, value: float | None) -> str:
    return "not finite" if value is None else score.text(score.scale * value)


def _mb(size: float) -> str:
    return f"{size / 1e6:.3f}"


def _saved(report: Report) -> str:
    r = report.results
    size = r.saving * r.dense_total_bytes
    if size < 0:
        return f"nothing: {100 * -r.saving:.2f} % ({_mb(-size)} MB) more than its dense messages"
    return f"{100 * r.saving:.2f} % ({_mb(size)} MB); {100 * r.density.uplink_mean:.1f} % of the prunable weights travelled up"


def _of_that(report: Report) -> str:
    """What of the bytes a reader may not expect: masks, evaluation, waste."""
    parts = report.flows.parts
    sizes = {name: sum(parts[way, name] for way in ("up", "down")) for name in ("mask", "evaluation", "waste")}
    words = {"mask": "masks", "evaluation": "evaluation and questions", "waste": "lost on clients that failed"}
    named = [f"{_mb(size)} {words[name]}" for name, size in sizes.items() if size]
    return f"; of that {', '.join(named)}" if named else ""


def _left_out(report: Report) -> str:
    size = report.ledger.total(by=("phase",)).get(("evaluate",), 0)
    return f"of the saving: {_mb(size)} MB of evaluation on clients; of any number: " if size else ""
