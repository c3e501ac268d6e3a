"""A finished run in ten lines: what it was, what it reached, what it sent and saved, against what, and what is not counted."""

from __future__ import annotations

from fl_sim.report.experiment_facts import facts
from fl_sim.report.sizes import size
from fl_sim.report.summary import Report

COLUMN = 11
"""Where the text of a line begins, behind what it is about."""


def explanation(report: Report) -> list[str]:
    """Ten lines of plain text, each starting with what it is about.

    Raises:
        UserError: a file of the run folder is damaged.
    """
    r, told = report.results, facts(report)
    ended = f"; stopped {r.stopped}" if r.stopped else ""
    return [
        f"run        {r.name} ({r.id}), seed {r.seed}: {told['cohort']}, engine {r.engine}, {r.wall_s:.1f} s{ended}",
        f"data       {told['data']}; {told['partition']}; hash {told['data hash']}",
        f"model      {told['model']}",
        f"clients    {told['client']}; {told['training']}; code {told['code']}",
        f"server     {told['strategy']}; {told['codecs']}; {told['network']}",
        f"{r.score.name:<10} {r.score.told(r.score.final)} on the test set after the last round, "
        f"{r.score.told(r.score.last10_mean)} mean of the last ten rounds{_of_clients(report)}",
        f"encoded    {_size(r.total_bytes)}: {_size(r.uplink_bytes)} up, {_size(r.downlink_bytes)} down"
        f"{_of_that(report)}",
        f"saved      {_saved(report)}",
        f"against    the same training messages, each sent as a dense float32 model{_without(report)}: "
        f"{_size(r.dense_total_bytes)}; not another run, which may need other rounds for the same {r.score.name}: "
        "`fl-sim compare --baseline` tells",
        f"not in it  {_left_out(report)}HTTP and TLS; Flower's framing (its own count: {_size(r.protocol_bytes)}); "
        "energy; speed-up of masked layers (MACs are counted, not timed)",
    ]


def _without(report: Report) -> str:
    """That the dense model is not all of the model, where its builder froze some."""
    r, model = report.results, report.config["model"]
    asked = isinstance(model, dict) and (
        model.get("trainable", "all") != "all" or model.get("adapter") or model.get("personal")
    )
    return "" if asked or r.trainable_params == r.params else " (without the parameters that its builder froze)"


def _of_clients(report: Report) -> str:
    """The distribution over clients, where some evaluated."""
    r, each = report.results, report.results.clients
    if each is None:
        return ""
    mean, tenth, worst = (
        r.score.told(value) for value in (each.mean, each.p10 if r.score.higher else each.p90, each.worst)
    )
    return f"; on clients' own test samples mean {mean}, worst tenth from {tenth}, worst {worst}"


def _size(count: float) -> str:
    return size(count, 3)


def _saved(report: Report) -> str:
    r = report.results
    saved = r.saving * r.dense_total_bytes
    if saved < 0:
        return f"nothing: {100 * -r.saving:.2f} % ({_size(-saved)}) more than its dense messages"
    return f"{100 * r.saving:.2f} % ({_size(saved)}); {100 * r.density.uplink_mean:.1f} % of the prunable weights travelled up"


def _of_that(report: Report) -> str:
    """What of the bytes a reader may not expect: masks, evaluation, waste."""
    parts = report.flows.parts
    sizes = {name: sum(parts[way, name] for way in ("up", "down")) for name in ("mask", "evaluation", "waste")}
    words = {"mask": "masks", "evaluation": "evaluation and questions", "waste": "what clients lost that failed"}
    named = [f"{_size(count)} of {words[name]}" for name, count in sizes.items() if count]
    return f"; of that {', '.join(named)}" if named else ""


def _left_out(report: Report) -> str:
    count = report.ledger.total(by=("phase",)).get(("evaluate",), 0)
    return f"of the saving: {_size(count)} of evaluation on clients; of any number: " if count else ""
