"""`fl-sim reproduce`: published methods, their claims of bytes beside the bytes that were encoded."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_sim.cli.imports import imports_uncollected
from fl_sim.cli.screen import console, errors, typed
from fl_sim.core.errors import UserError

if TYPE_CHECKING:
    from fl_sim.bench.claims.trial import Case
    from fl_sim.config.experiment import Experiment
    from fl_sim.report import Report
    from fl_sim.simulation.sweep import Outcome


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="methods, see --list")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every method of the task")] = False,
    listed: Annotated[bool, typer.Option("--list", help="print the claims and run nothing")] = False,
    seeds: Annotated[str, typer.Option(help="comma-separated seeds; every run is done under each")] = "0,1,2",
    task: Annotated[
        str, typer.Option(help="digits, or roles (characters of a play, a client for each role)")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="folder of the runs and of the page")] = Path("runs/claims"),
    rounds: Annotated[int | None, typer.Option(min=1, help="in the place of the task's; the page says so")] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="factors such as 0.3,1,3: validation chooses every arm's local learning rate among them"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at once, each in a process of its own")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="print errors only")] = False,
) -> None:
    """Run published methods in a scaled setting, and write what their papers claim beside the bytes that were encoded.

    Dense FedAvg and smaller dense models run beside them. Finished runs are not run again; a failed one does not stop the
    others. The page is OUT/claims_TASK.md: what was asked for in this call, and which methods of the task were not.

    Example: fl-sim reproduce topk stc --seeds 0 --rounds 3

    Example: fl-sim reproduce --all --seeds 0,1,2,3,4 --rates 0.3,1,3 --jobs 2
    """
    with imports_uncollected():
        from fl_sim.bench.claims.rates import Search
        from fl_sim.bench.claims.trial import Asked, case_of, chosen, experiments
        from fl_sim.core.files import require_folder
        from fl_sim.simulation.sweep import decimals, integers

    if listed:
        for line in _lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    require_folder(out)
    methods = chosen(names or [], everything=everything, task=task)
    asked = Asked(task, methods, integers("--seeds", seeds), str(out), rounds)
    try:
        search = None if rates is None else Search(asked, decimals("--rates", rates))
        found = None if search is None else search.chosen(_outcomes(search.experiments, jobs=jobs, quiet=quiet))
        ended = _outcomes(experiments(asked, found), jobs=jobs, quiet=quiet)
    except KeyboardInterrupt as error:
        again = shlex.join([typed(), *sys.argv[1:]])
        errors.print(f"fl-sim: interrupted; the same command goes on: {again}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from error
    defined = chosen([], everything=True, task=task)
    case = case_of(task, ended)
    missing = [name for name in defined if name not in case.methods]
    path = _write(case, out, missing, rates)
    if not quiet:
        console.print(str(path), highlight=False, soft_wrap=True)
    if case.failed:
        raise RuntimeError(f"{len(case.failed)} of {len(ended)} runs failed; {path} says which")


def _outcomes(planned: list[Experiment], *, jobs: int, quiet: bool) -> list[Outcome]:
    from fl_sim.simulation.parallel_runs import outcomes

    ended = []
    for number, outcome in enumerate(outcomes(planned, jobs=jobs, fresh=False, here=_run), start=1):
        ended.append(outcome)
        _say(number, len(planned), outcome, quiet=quiet)
    return ended


def _lines() -> list[str]:
    from fl_sim.bench.claims.claim import DIRECTIONS, read_claims

    lines = []
    for name, claim in read_claims().items():
        said = (
            f"{claim.number} (x {claim.ratio:g}, {DIRECTIONS[claim.direction]})"
            if claim.ratio
            else "no number of bytes"
        )
        lines.append(f"{name:<18}{claim.title}: {said}; {claim.paper}, {claim.version}, {claim.source}")
    return lines


def _run(experiment: Experiment) -> Report:
    from fl_sim.simulation.earlier_runs import is_stopped
    from fl_sim.simulation.loop import run

    return run(experiment, resume=is_stopped(experiment), quiet=True)


def _say(number: int, count: int, outcome: Outcome, *, quiet: bool) -> None:
    where = f"{number}/{count}  {outcome.experiment.name}  seed {outcome.experiment.seed}"
    if outcome.report is None:
        errors.print(f"{where}  failed: {outcome.reason}", style="red", soft_wrap=True, markup=False)
    elif not quiet:
        how = "already there" if outcome.skipped else f"done in {outcome.report.results.wall_s:.1f} s"
        console.print(f"{where}  {how}", highlight=False, markup=False, soft_wrap=True)


def _write(case: Case, out: Path, missing: list[str], rates: str | None) -> Path:
    from fl_sim.bench.claims.page import page
    from fl_sim.bench.claims.picture import draw
    from fl_sim.core.files import write_atomically
    from fl_sim.simulation.user_code import own_code

    path, picture = out / f"claims_{case.task}.md", out / f"claims_{case.task}.svg"
    command = shlex.join(["fl-sim", *sys.argv[1:]])
    text = page(case, command=command, code=f"code {own_code()}", missing=missing, picture=picture.name, rates=rates)
    try:
        write_atomically(picture, draw(case).encode())
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return path
