"""Commands on finished runs: `fl-sim report`, `explain`, `compare` and `replay`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_sim.cli.screen import console, errors, show, wide

if TYPE_CHECKING:
    from fl_sim.report import Report


def report(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Show where a finished run's bytes went, their floor, and what published formulas would have claimed.

    Writes report.html into the run's folder: charts that open in any browser, without a network.

    Example: fl-sim report runs/quickstart-bc58d0c5
    """
    from fl_sim.report import Report, comparison, estimates, floors, per_run, write_page

    loaded = Report.load(run)
    for table in (comparison([loaded]), per_run(loaded), estimates(loaded)):
        show(table)
    console.print(floors(loaded), highlight=False)
    write_page([loaded], run / "report.html")
    console.print(str(run / "report.html"), highlight=False)


def explain(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Say in ten lines what a finished run was, what it saved, against what, and what is not counted.

    Example: fl-sim explain runs/quickstart-bc58d0c5
    """
    from fl_sim.report import Report, explanation

    loaded = Report.load(run)
    if console.is_terminal:
        console.print(loaded)
    else:
        print("\n".join(explanation(loaded)))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders, for instance runs/quickstart-*")],
    page: Annotated[Path | None, typer.Option("--html", help="write charts and tables to this file as well")] = None,
    as_text: Annotated[str | None, typer.Option("--format", help="csv, markdown or latex instead of tables")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="run beside which the others stand, seed by seed: bytes to what it reached")
    ] = None,
    small: Annotated[
        list[Path] | None,
        typer.Option(
            help="run of a smaller dense model, to set beside runs of as many bytes; may be given several times"
        ),
    ] = None,
) -> None:
    """Compare finished runs in one table; runs that differ only by their seed become one line with an interval.

    Folders of runs that did not finish are left out, with a note.

    Example: fl-sim compare runs/quickstart-* --baseline quickstart --html comparison.html
    """
    from fl_sim.core.files import require_place
    from fl_sim.core.lookup import find
    from fl_sim.report import (
        FORMATS,
        against,
        beside,
        comparison,
        grouped,
        other_data,
        over_seeds,
        require_small,
        small_models,
        small_table,
        write_page,
    )

    if page is not None:
        require_place(page)
    reports = _finished([*runs, *(small or [])])
    groups = grouped(reports)
    require_small(groups, small or [])
    columns = [] if baseline is None else against(groups, baseline)
    if different := other_data(reports):
        errors.print(f"fl-sim: {different}", soft_wrap=True, markup=False)
    if page is not None:
        write_page(reports, page)
    if as_text is not None:
        print(find("--format", as_text, FORMATS)(groups, columns), end="")
        return
    show(comparison(reports))
    if baseline is not None:
        wide(150).print(beside(groups, baseline))  # nine columns
    elif any(len(group.reports) > 1 for group in groups):
        show(over_seeds(groups))
    if small_models(groups):
        wide(110).print(small_table(groups))  # seven columns
    if page is not None:
        console.print(str(page), highlight=False)


def _finished(runs: list[Path]) -> list[Report]:
    """The reports of the runs that finished.

    Raises:
        UserError: none did, or a folder is missing or damaged.
    """
    from fl_sim.report import Report, Unfinished

    reports: list[Report] = []
    left_out: list[Unfinished] = []
    for folder in runs:
        try:
            reports.append(Report.load(folder))
        except Unfinished as error:
            left_out.append(error)
    if not reports:
        raise left_out[0]
    for reason in left_out:
        errors.print(f"fl-sim: left out: {reason}", soft_wrap=True, markup=False)
    return reports


def replay(
    run: Annotated[
        Path, typer.Argument(help="folder of a run with wire.record_payloads = 1, or wire.record_masks = true")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="encoding of one direction: wire.uplink.values=int8, wire.downlink.content=difference, ..."
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(
            help="of both directions: float32, float32-zstd, float32-delta, float16, float16-delta, bfloat16, "
            "bfloat16-delta, int8, int4, int2, sign, top25-int8, top10-int8, top10-ternary, top1-ternary"
        ),
    ] = None,
    mask: Annotated[str, typer.Option(help="mask codec: fl_sim, coo, bitmap, free")] = "fl_sim",
) -> None:
    """Encode again what a finished run moved, under other codecs, without training again.

    Every number is the length of encoded bytes. Recorded masks alone allow other mask codecs; other value types need the
    recorded payloads of a run whose own values are exact (float32, float32-zstd, float32-delta).

    Example: fl-sim replay runs/quickstart-bc58d0c5 wire.uplink.values=int8 wire.uplink.content=difference --mask coo
    """
    from fl_sim.report import Report, replayed
    from fl_sim.simulation.replaying import asked, replay_run

    loaded = Report.load(run)
    recoding = asked(loaded, overrides or [], values=values, mask=mask)
    show(replayed(replay_run(loaded, recoding)))
