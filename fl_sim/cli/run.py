"""`fl-sim run` and `sweep`."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_sim.cli.imports import imports_uncollected
from fl_sim.cli.screen import console, errors, show, typed, wide
from fl_sim.cli.watch import beside
from fl_sim.core.errors import UserError
from fl_sim.runtime.grids import forkserver

if TYPE_CHECKING:
    from fl_sim.config.experiment import Experiment
    from fl_sim.report import Report


def run(
    config: Annotated[Path, typer.Argument(help="experiment as TOML, for instance configs/quickstart.toml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for instance rounds=5 training.lr=0.05")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="inline, workers, ray, cohort or auto; overrides the config")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder that receives the run's folder")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print errors only")] = False,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, mlflow or wandb (offline); may be given several times")
    ] = None,
    go_on: Annotated[
        bool,
        typer.Option("--resume", help="go on after the last checkpoint of a stopped run, or of one of fewer rounds"),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over, in the place of what is there")] = False,
    live: Annotated[
        bool, typer.Option("--watch", help="print the address of a live page, for this machine only")
    ] = False,
) -> None:
    """Run one experiment and leave its results in a run folder.

    A finished run is shown and not run again; rounds that a stopped run kept are never overwritten without --fresh.

    Example: fl-sim run configs/quickstart.toml rounds=5 --engine ray
    """
    if engine == "workers":
        forkserver.prepare()  # it imports what it needs while this process does the same

    with imports_uncollected():
        from fl_sim.config.experiment import Experiment, run_folder
        from fl_sim.report import comparison, per_run
        from fl_sim.report.progress import display
        from fl_sim.report.trackers import together, tracked
        from fl_sim.simulation.loop import run as start

    extra = [f'engine="{engine}"'] if engine else []
    extra += [f'out="{out}"'] if out else []
    experiment = Experiment.load(config, [*(overrides or []), *extra])
    started = Path.cwd()
    try:
        served = beside(run_folder(experiment)) if live else nullcontext()
        with served, display(experiment, console, quiet=quiet) as shown, tracked(track or [], experiment) as trackers:
            report = start(experiment, together([shown, *trackers]), resume=go_on, fresh=fresh)
    except KeyboardInterrupt as error:
        words = [word for word in sys.argv[1:] if word != "--fresh"]
        again = shlex.join([typed(), *words, *([] if go_on else ["--resume"])])
        errors.print(f"fl-sim: interrupted; to go on: {again}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from error
    if not quiet:
        show(per_run(report))
        show(comparison([report]))
        page, precision = _shown(report.folder / "report.html", started), report.results.precision
        console.print(f"{page}  (computed in {precision})", highlight=False, soft_wrap=True)


def _shown(path: Path, started: Path) -> Path:
    """A path as the user would type it: relative where it lies below the folder in which the program started."""
    return path.relative_to(started) if path.is_relative_to(started) else path


def sweep(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=A,B,C]...",
            help="experiments as TOML; then, for all of them, every combination of values",
            show_default=False,
        ),
    ],
    seeds: Annotated[str, typer.Option(help="comma-separated seeds; every combination runs under each")] = "0,1,2",
    out: Annotated[Path | None, typer.Option(help="folder that receives the runs' folders")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="write charts and tables to this file as well")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="run everything again, in the place of what is there")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="runs at once, each in a process of its own")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="print errors only")] = False,
    live: Annotated[
        bool, typer.Option("--watch", help="print the address of a live page, for this machine only")
    ] = False,
) -> None:
    """Run a grid under several seeds; finished runs are skipped, stopped ones go on, a failed one does not stop the others.

    A finished run whose code or data have changed since is not skipped: its line says what changed, and it counts as failed.

    A config with a \\[study] trains pairs of models centrally instead: which student profits from which teacher.

    Example: fl-sim sweep configs/quickstart.toml data.alpha=0.1,1.0 rounds=10 --seeds 0,1,2

    Example: fl-sim sweep configs/quickstart.toml configs/digits_*.toml --jobs 2 --html comparison.html
    """
    with imports_uncollected():
        from fl_sim.core.files import require_folder, require_place
        from fl_sim.simulation.sweep import integers, plan, sorted_out

    if page is not None:
        require_place(page)
    under = integers("--seeds", seeds)
    configs, overrides = sorted_out(words)
    there = [f'out="{out}"'] if out else []
    if out is not None:
        require_folder(out)
    experiments = [each for config in configs for each in plan(config, [*overrides, *there], seeds=under)]
    try:
        if not any(experiment.study for experiment in experiments):
            with beside(Path(experiments[0].out)) if live else nullcontext():
                _federations(experiments, page=page, jobs=jobs, fresh=fresh, quiet=quiet)
        else:
            if fresh:
                raise UserError("--fresh: not with a [study]; delete the trainings that shall be run again")
            if live:
                raise UserError("--watch: not with a [study], which has no rounds to show")
            if jobs > 1:
                raise UserError("--jobs: not with a [study], which trains one model after the other")
            _studies([experiment for experiment in experiments if experiment.seed == under[0]], under, quiet=quiet)
    except KeyboardInterrupt as error:
        again = shlex.join([typed(), *sys.argv[1:]])
        how = "starts over, without --fresh it goes on" if fresh else "goes on"
        errors.print(f"fl-sim: interrupted; the same command {how}: {again}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from error


def _studies(experiments: list[Experiment], seeds: list[int], *, quiet: bool) -> None:
    from fl_sim.bench.capacity_study import Trial, folder, measure
    from fl_sim.bench.show import document, show_rows
    from fl_sim.core.files import write_atomically

    def starts(trial: Trial) -> None:
        if not quiet:
            errors.print(str(trial), soft_wrap=True)

    for experiment in experiments:
        rows = measure(experiment, seeds=seeds, on_trial=starts)
        table = folder(experiment) / f"table-{experiment.id}.json"
        write_atomically(table, document(rows).encode())
        if not quiet:
            show_rows(wide(170), rows, as_json=False)  # fourteen columns
            console.print(str(table), highlight=False, soft_wrap=True)


def _federations(experiments: list[Experiment], *, page: Path | None, jobs: int, fresh: bool, quiet: bool) -> None:
    from fl_sim.config.experiment import run_folder
    from fl_sim.report import grouped, other_data, over_seeds, write_page
    from fl_sim.report.progress import display
    from fl_sim.simulation.earlier_runs import already_there, is_finished, is_stopped
    from fl_sim.simulation.loop import run as start
    from fl_sim.simulation.parallel_runs import outcomes
    from fl_sim.simulation.sweep import told_apart

    which = [
        f"{number}/{len(experiments)}  {run_folder(experiment)}  {words}"
        for number, (experiment, words) in enumerate(zip(experiments, told_apart(experiments), strict=True), start=1)
    ]
    # Of an experiment that is asked for twice, the first is computed.
    titles = dict(zip(map(run_folder, reversed(experiments)), reversed(which), strict=True))
    waiting = [fresh or not is_finished(experiment) for experiment in experiments]
    spent: list[float] = []

    def one(experiment: Experiment) -> Report:
        with display(experiment, console, quiet=quiet, title=titles[run_folder(experiment)]) as observer:
            return start(experiment, observer, resume=not fresh and is_stopped(experiment), fresh=fresh)

    finished, failed, since = [], 0, time.perf_counter()
    for number, outcome in enumerate(outcomes(experiments, jobs=jobs, fresh=fresh, here=one), start=1):
        where = which[number - 1]
        if waiting[number - 1]:
            spent.append(time.perf_counter() - since)
        since = time.perf_counter()
        rest = _rest(len(experiments) - number, spent, sum(waiting[number:]))
        if outcome.report is None:
            failed += 1
            errors.print(f"{where}  failed: {outcome.reason}{rest}", style="red", soft_wrap=True, markup=False)
            continue
        finished.append(outcome.report)
        if not quiet:
            score = outcome.report.results.score
            done = f"done, {score.name} {score.told(score.final)}"
            how = already_there(outcome.report) if outcome.skipped else done
            console.print(f"{where}  {how}{rest}", highlight=False, soft_wrap=True, markup=False)
    if finished and not quiet:
        show(over_seeds(grouped(finished)))
        if different := other_data(finished):
            errors.print(f"fl-sim: {different}", soft_wrap=True, markup=False)
    if finished and page is not None:
        write_page(finished, page)
        if not quiet:
            console.print(str(page), highlight=False, soft_wrap=True)
    if failed:
        raise RuntimeError(f"{failed} of {len(experiments)} runs failed")


def _rest(left: int, spent: list[float], waiting: int) -> str:
    """What a sweep still has before it: `; 3 left, about 0:01:30`, at the mean time of the runs that it computed so far."""
    about = f", about {timedelta(seconds=round(sum(spent) / len(spent) * waiting))}" if spent and waiting else ""
    return f"; {left} left{about}" if left else ""
