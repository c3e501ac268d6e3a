"""The court's page in Markdown, with the picture of accuracy against bytes beside it."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence

from fl_sim.bench.claims.claim import DIRECTIONS, cannot
from fl_sim.bench.claims.parts import PARTS
from fl_sim.bench.claims.rates import SEED
from fl_sim.bench.claims.rows import MOVED, Row, front, row_of, shares, verdict
from fl_sim.bench.claims.trial import Case
from fl_sim.report.groups import Group
from fl_sim.report.measures import LAST, score_of

UNTUNED = "No setting was searched for: the table says what was sent, and it does not rank the methods."
TUNED = (
    f"The local learning rate of every arm, smaller models too, is the factor {{rates}} of its own with the best validation metric "
    f"under seed {SEED}; nothing else was searched for."
)
ABSENT = "n/a"
"""A cell that has no number."""


def page(case: Case, *, command: str, code: str, missing: Sequence[str], picture: str, rates: str | None = None) -> str:
    """The whole page.

    Args:
        case: the finished runs.
        command: what was typed. code: version of the code that ran.
        missing: methods of the task without a finished run.
        picture: file name of the drawing.
        rates: factors among which validation chose learning rates; None = every arm has its own.
    """
    rows = [row_of(case, name) for name in case.methods]
    parts = (
        [f"# Claims of papers beside encoded bytes: {case.task}", ""],
        _head(case, command, code, rates),
        ["## Claimed and measured", "", *_claimed(rows), ""],
        ["## Accuracy for the bytes", "", *_accuracy(case, rows), "", f"![metric against MB]({picture})", ""],
        ["## Smaller dense models", "", *_small(case), ""],
        ["## What the bytes are", "", *_parts(case, rows), ""],
        ["## Deviations from the papers", "", *_deviations(rows), ""],
        ["## What is missing", "", *_missing(case, missing), ""],
    )
    return "\n".join(line for part in parts for line in part)


def _head(case: Case, command: str, code: str, rates: str | None) -> list[str]:
    report = case.dense.reports[0]
    versions = ", ".join(f"{name} {version}" for name, version in report.results.versions.items() if name != "fl-sim")
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return [
        f"`{command}`, {today}, {os.cpu_count()} cores ({platform.machine()}), device {report.config.get('device')}, "
        f"{versions}, fl-sim {report.results.versions['fl-sim']} ({code}). Seeds {case.dense.seeds}; "
        f"{report.results.rounds} rounds.",
        "",
        "± is half a 95 % confidence interval over the seeds; one seed has none. *By its formula* counts what the paper counts and "
        "nothing else, from our ledger. *In its direction* and *both ways* count all payload bytes but those of evaluation on "
        "clients. Every ratio is dense FedAvg's bytes in that direction over the method's: same rounds, same clients, same seed. "
        + (UNTUNED if rates is None else TUNED.format(rates=rates)),
        "",
    ]


def words_of(case: Case) -> str:
    """The metric with its unit, and which way is better where that is not up."""
    score = score_of([case.dense])
    return f"{score.name} {score.unit}".strip() + ("" if score.higher else ", lower is better")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _claimed(rows: Sequence[Row]) -> list[str]:
    made = []
    for row in rows:
        claim = row.claim
        words = f"{claim.number} (x {claim.ratio:g})" if claim.ratio else "none found"
        made.append(
            [
                row.name,
                f"[{claim.paper}]({claim.source}), {claim.version}",
                words,
                f"{DIRECTIONS[claim.direction]}{': ' if claim.formula else ''}{claim.formula}",
                claim.setting or ABSENT,
                f"x {row.formula.text(1)}",
                f"x {row.direction.text(1)}",
                f"x {row.total.text(1)}",
                row.reason or "nothing above 0.5 %",
            ]
        )
    headings = [
        "method",
        "paper",
        "claim",
        "counts",
        "setting of the paper",
        "by its formula",
        "in its direction",
        "both ways",
    ]
    return _table([*headings, "not in the formula, % of all bytes"], made)


def _accuracy(case: Case, rows: Sequence[Row]) -> list[str]:
    score = score_of([case.dense])
    best = [group.name for group in front([case.dense, *(row.group for row in rows), *case.small])]
    dense = [
        case.dense.name,
        _rate(case.dense),
        MOVED.text(case.dense),
        LAST.text(case.dense),
        ABSENT,
        ABSENT,
        ABSENT,
        ABSENT,
    ]
    made = [[*dense, "yes" if case.dense.name in best else ""]]
    for row in rows:
        small = (
            ["none", ABSENT]
            if row.small is None or row.beyond_small is None
            else [_sized(row.small), row.beyond_small.text(2)]
        )
        stopped = row.stopped.text(1)
        made.append(
            [
                row.name,
                _rate(row.group),
                MOVED.text(row.group),
                LAST.text(row.group),
                row.beyond_dense.text(2),
                stopped,
                small[0],
                f"{small[1]} ({verdict(row, higher=score.higher)})",
                "yes" if row.name in best else "",
            ]
        )
    word = words_of(case)
    headings = [
        "method",
        "learning rate",
        "MB both ways",
        word,
        "beyond dense",
        "dense, stopped at these MB",
        "smaller dense model",
        "beyond it",
    ]
    return _table([*headings, "on the front"], made)


def _rate(group: Group) -> str:
    """The clients' learning rate."""
    training = group.reports[0].config["training"]
    return f"{training['lr']:g}" if isinstance(training, dict) else ABSENT


def _sized(group: Group) -> str:
    return f"{group.name} ({MOVED.text(group)} MB)"


def _small(case: Case) -> list[str]:
    made = [
        [group.name, f"{group.reports[0].results.params:,}", _rate(group), MOVED.text(group), LAST.text(group)]
        for group in (case.dense, *case.small)
    ]
    return _table(["dense model", "parameters", "learning rate", "MB both ways", words_of(case)], made)


def _parts(case: Case, rows: Sequence[Row]) -> list[str]:
    groups = [case.dense, *(row.group for row in rows)]
    found = {group.name: shares(group) for group in groups}
    used = [part for part in PARTS if any(each[part] for each in found.values())]
    made = [[name, *(f"{100 * each[part]:.1f}" if each[part] else "" for part in used)] for name, each in found.items()]
    words = "; ".join(f"*{part}*: {PARTS[part]}" for part in used)
    return [f"% of all bytes of a run. {words}.", "", *_table(["method", *used], made)]


def _deviations(rows: Sequence[Row]) -> list[str]:
    return [
        f"- **{row.name}** ({row.claim.title}; {row.claim.equations}): {'; '.join(row.claim.deviations)}."
        for row in rows
    ]


def _missing(case: Case, missing: Sequence[str]) -> list[str]:
    lines = [f"- {name}: failed: {why}" for name, why in case.failed]
    lines += [f"- {name}: not run" for name in missing]
    lines += [f"- {name}: cannot run here: {why}" for name, why in cannot(case.task).items()]
    return lines or ["Nothing: every method has a row."]
