"""The command line: `fl-sim run`, `compare`, `list`, `bench`. Exit status 0 done, 2 wrong input, 1 the run failed."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.markup import escape

from fl_sim.bench.commands import bench
from fl_sim.errors import UserError, in_one_line, told, users_line
from fl_sim.runtime import forking

if TYPE_CHECKING:
    from fl_sim.config import Experiment
    from fl_sim.report import Report
    from fl_sim.types import Client

app = typer.Typer(
    name="fl-sim",
    help="Federated learning whose communication numbers are the bytes it encoded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
errors = Console(stderr=True, highlight=False)


class _ToStderr(logging.Handler):
    """Lines go where stderr points when they come: a live display takes them in and shows them above its bars."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _typed() -> str:
    """This program as it was called, so that a command that we show can be pasted."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "fl-sim" and shutil.which("fl-sim") != str(called) else "fl-sim"


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="experiment as TOML, for instance configs/quickstart.toml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for instance rounds=5 training.lr=0.05")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="inline, workers, ray, cohort, or auto; overrides the config")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder that receives the run's folder")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print errors only")] = False,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, mlflow or wandb (offline); may be given several times")
    ] = None,
    go_on: Annotated[bool, typer.Option("--resume", help="go on after the last checkpoint of a stopped run")] = False,
) -> None:
    """Run one experiment and leave its results in a run folder.

    Example: fl-sim run configs/quickstart.toml rounds=5 --engine ray
    """
    if engine == "workers":
        forking.prepare()  # it imports what it needs while this process does the same

    from fl_sim.auto import settled
    from fl_sim.config import Experiment
    from fl_sim.progress import display
    from fl_sim.report import comparison, per_run, write_page
    from fl_sim.simulation import resume
    from fl_sim.simulation import run as start
    from fl_sim.trackers import together, tracked

    extra = [f'engine="{engine}"'] if engine else []
    extra += [f'out="{out}"'] if out else []
    experiment, why = settled(Experiment.load(config, [*(overrides or []), *extra]))
    if why is not None and not quiet:
        console.print(why, highlight=False, soft_wrap=True)
    try:
        with display(experiment, console, quiet=quiet) as shown, tracked(track or [], experiment) as trackers:
            report = (resume if go_on else start)(experiment, together([shown, *trackers]))
    except KeyboardInterrupt as error:
        again = shlex.join([_typed(), *sys.argv[1:], *([] if go_on else ["--resume"])])
        errors.print(f"fl-sim: interrupted; to go on: {again}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from error
    write_page([report], report.folder / "report.html")
    if not quiet:
        console.print(per_run(report))
        console.print(comparison([report]))
        page, precision = report.folder / "report.html", report.summary["precision"]
        console.print(f"{page}  (computed in {precision})", highlight=False, soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Show where a finished run's bytes went, their floor, and what published formulas would have claimed.

    Writes report.html into the run's folder: charts that open in any browser, without a network.

    Example: fl-sim report runs/quickstart-bc58d0c5
    """
    from fl_sim.report import Report, comparison, estimates, floors, per_run, write_page

    loaded = Report.load(run)
    for table in (comparison([loaded]), per_run(loaded), estimates(loaded)):
        console.print(table)
    console.print(floors(loaded), highlight=False)
    write_page([loaded], run / "report.html")
    console.print(str(run / "report.html"), highlight=False)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="folder of a run with wire.record_masks = true")],
    values: Annotated[str, typer.Option(help="value type to price: float32, float16, bfloat16, int8")] = "float32",
    mask: Annotated[str, typer.Option(help="mask codec to price: fl_sim, coo, bitmap, free")] = "fl_sim",
) -> None:
    """Price a run's recorded masks under other codecs, without training again.

    Example: fl-sim replay runs/quickstart-bc58d0c5 --values int8 --mask coo
    """
    from fl_sim.config import Experiment
    from fl_sim.federation import Federation
    from fl_sim.replay import read_masks
    from fl_sim.replay import replay as price
    from fl_sim.report import Report, repriced

    loaded = Report.load(run)
    schema = Federation.build(Experiment.load(run / "config.toml")).exchange.schema
    masks = read_masks(run / "masks.parquet", schema)
    console.print(repriced(loaded, price(loaded.ledger, masks, schema, values=values, mask=mask), f"{values}, {mask}"))


@app.command()
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
    quiet: Annotated[bool, typer.Option("--quiet", help="print errors only")] = False,
) -> None:
    """Run a grid under several seeds; finished runs are skipped, stopped ones go on, a failed one does not stop the others.

    A config with a [study] trains pairs of models centrally instead: which student profits from which teacher.

    Example: fl-sim sweep configs/quickstart.toml data.alpha=0.1,1.0 rounds=10 --seeds 0,1,2

    Example: fl-sim sweep configs/quickstart.toml configs/digits_*.toml --html comparison.html
    """
    from fl_sim.sweep import integers, plan, sorted_out

    under = integers("--seeds", seeds)
    configs, overrides = sorted_out(words)
    there = [f'out="{out}"'] if out else []
    experiments = [each for config in configs for each in plan(config, [*overrides, *there], seeds=under)]
    try:
        if not any(experiment.study for experiment in experiments):
            _federations(experiments, page=page, quiet=quiet)
        else:
            _studies([experiment for experiment in experiments if experiment.seed == under[0]], under, quiet=quiet)
    except KeyboardInterrupt as error:
        again = shlex.join([_typed(), *sys.argv[1:]])
        errors.print(f"fl-sim: interrupted; the same command goes on: {again}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from error


def _studies(experiments: list[Experiment], seeds: list[int], *, quiet: bool) -> None:
    from fl_sim.bench.show import document, show_rows
    from fl_sim.files import write_atomically
    from fl_sim.study import Trial, folder, measure

    def starts(trial: Trial) -> None:
        if not quiet:
            errors.print(str(trial), soft_wrap=True)

    for experiment in experiments:
        rows = measure(experiment, seeds=seeds, on_trial=starts)
        table = folder(experiment) / f"table-{experiment.id}.json"
        write_atomically(table, document(rows).encode())
        if not quiet:
            show_rows(Console(width=max(console.width, 170)), rows, as_json=False)  # fourteen columns
            console.print(str(table), highlight=False, soft_wrap=True)


def _federations(experiments: list[Experiment], *, page: Path | None, quiet: bool) -> None:
    from fl_sim.folder import run_folder
    from fl_sim.progress import display
    from fl_sim.report import grouped, over_seeds, write_page
    from fl_sim.simulation import resume
    from fl_sim.sweep import sweep as outcomes

    def one(experiment: Experiment) -> Report:
        with display(experiment, console, quiet=quiet) as observer:
            return resume(experiment, observer)

    finished, failed = [], 0
    for number, outcome in enumerate(outcomes(experiments, one), start=1):
        where = f"{number}/{len(experiments)}  {run_folder(outcome.experiment)}"
        if outcome.report is None:
            failed += 1
            errors.print(f"{where}  failed: {outcome.reason}", style="red", soft_wrap=True, markup=False)
            continue
        finished.append(outcome.report)
        if not quiet:
            console.print(f"{where}  {'already there' if outcome.skipped else 'done'}", highlight=False, soft_wrap=True)
    if finished and not quiet:
        console.print(over_seeds(grouped(finished)))
    if finished and page is not None:
        write_page(finished, page)
        if not quiet:
            console.print(str(page), highlight=False, soft_wrap=True)
    if failed:
        raise RuntimeError(f"{failed} of {len(experiments)} runs failed")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders, for instance runs/quickstart-*")],
    page: Annotated[Path | None, typer.Option("--html", help="write charts and tables to this file as well")] = None,
    as_text: Annotated[str | None, typer.Option("--format", help="csv, markdown or latex instead of tables")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="run beside which the others stand, seed by seed: bytes to what it reached")
    ] = None,
) -> None:
    """Compare finished runs in one table; runs that differ only by their seed become one line with an interval.

    Example: fl-sim compare runs/quickstart-* --baseline quickstart --html comparison.html
    """
    from fl_sim.lookup import find
    from fl_sim.report import FORMATS, Report, against, beside, comparison, grouped, over_seeds, write_page

    reports = [Report.load(folder) for folder in runs]
    groups = grouped(reports)
    if page is not None:
        write_page(reports, page)
    if as_text is not None:
        columns = [] if baseline is None else against(groups, baseline)
        print(find("--format", as_text, FORMATS)(groups, columns), end="")
        return
    console.print(comparison(reports))
    if baseline is not None:
        Console(width=max(console.width, 150)).print(beside(groups, baseline))  # nine columns
    elif any(len(group.reports) > 1 for group in groups):
        console.print(over_seeds(groups))
    if page is not None:
        console.print(str(page), highlight=False)


@app.command()
def prune(
    checkpoint: Annotated[Path, typer.Argument(help="safetensors state dict, or folder of a finished run")],
    method: Annotated[
        str, typer.Option(help="global, rd, lamp, erk, uniform, random, batchnorm, or module:function")
    ] = "global",
    density: Annotated[float, typer.Option(help="share of the prunable weights that stays")] = 0.1,
    min_keep: Annotated[int, typer.Option(help="weights that every layer keeps at least")] = 0,
    threshold: Annotated[float, typer.Option(help="|gamma| of a disabled channel, for batchnorm")] = 0.01,
    calibration: Annotated[
        str | None, typer.Option(help="data source for rd and for accuracies; without one, rd draws Gaussian images")
    ] = None,
    images: Annotated[int, typer.Option(help="calibration images")] = 128,
    levels: Annotated[int, typer.Option(help="points of a distortion curve")] = 21,
    model: Annotated[str | None, typer.Option(help="architecture of a state dict: a name of `fl-sim list`")] = None,
    image_size: Annotated[int, typer.Option(help="pixels a side, for a state dict")] = 32,
    out: Annotated[Path | None, typer.Option(help="file to write; default: beside the checkpoint")] = None,
) -> None:
    """Prune one model, without a federation: a table per layer, and the pruned state dict.

    Example: fl-sim prune runs/quickstart-1a2b3c4d --method rd --density 0.1 --calibration digits
    """
    from fl_sim.curves import MeasureCurves, calibration_images
    from fl_sim.lookup import find
    from fl_sim.model_file import data_for, open_saved
    from fl_sim.progress import counting
    from fl_sim.prune import METHODS, Request, layer_rows
    from fl_sim.report import effect, pruned_table

    saved = open_saved(checkpoint, name=model, image_size=image_size)
    data = None if calibration is None else data_for(saved, calibration)
    with counting(errors, "distortion curves") as progress:
        given = calibration_images(data, saved.shape, images)
        request = Request(density, min_keep, threshold, given, MeasureCurves(levels=levels), progress)
        pruned = find("method", method, METHODS)(saved.model, request)
    console.print(pruned_table(layer_rows(saved.model, pruned, saved.shape)))
    for line in effect(saved.model, pruned, data):
        console.print(line, highlight=False)
    target = saved.path.with_name(f"{saved.path.stem}-{method}-{density:g}.safetensors".replace(":", "-"))
    console.print(saved.write(pruned, out or target), highlight=False)


app.add_typer(bench, name="bench")


@app.command()
def doctor(
    client: Annotated[str, typer.Argument(help="module:function, or module:preset")],
    options: Annotated[list[str] | None, typer.Argument(help="key=value, as in the config's [client] table")] = None,
    model: Annotated[str, typer.Option(help="the model it is tried on")] = "cnn_bn",
) -> None:
    """Try a client on a few digits and say in plain words what is wrong with it.

    Example: fl-sim doctor my_clients:proximal_client mu=0.01
    """
    from fl_sim.config import Experiment
    from fl_sim.doctor import examine

    experiment = Experiment.from_tree({"client": client}, [f"client.{option}" for option in options or []])
    built = cast("Client", experiment.client.build({"training": experiment.training}))
    config = {k: v for k, v in experiment.client.options.items() if isinstance(v, (bool, int, float, str))}
    findings = examine(built, model=model, config=config)
    for finding in findings:
        sign, style = ("✗", "red") if finding.problem else ("✓", "green")
        console.print(f"[{style}]{sign}[/{style}] {escape(finding.check)}", highlight=False, soft_wrap=True)
        if finding.problem:
            console.print(f"    {finding.problem}", style="bold", highlight=False, soft_wrap=True, markup=False)
    if any(finding.problem for finding in findings):
        raise typer.Exit(1)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="file to write")] = Path("experiment.toml")) -> None:
    """Write a config with every key, its meaning and its default, to start from.

    Example: fl-sim init mine.toml
    """
    from fl_sim.reference import template

    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(template())
    except FileExistsError as error:
        raise UserError(f"{path}: exists; init never overwrites, choose another name") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    console.print(f"{path}; now: {_typed()} run {path}", highlight=False, soft_wrap=True)


@app.command(name="list")
def list_(
    what: Annotated[str | None, typer.Argument(help="one kind only, for instance models")] = None,
) -> None:
    """List what a config can name, one line each: clients, strategies, models, data, partitions, schedules, and more.

    Example: fl-sim list models
    """
    from fl_sim.catalogue import KEYS, catalogue
    from fl_sim.lookup import find

    entries = catalogue()
    for title in entries if what is None else [what]:
        lines = find("fl-sim list", title, entries)
        console.print(f"[bold]{title}[/bold] ({KEYS[title]})", highlight=False)
        width = max(map(len, lines))
        for name, line in lines.items():
            console.print(f"  {name:<{width}}  {line}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Entry point: turns wrong input into one line and status 2, a failed run into one line and status 1."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    sys.path.insert(0, os.getcwd())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_ToStderr()])
    try:
        app(standalone_mode=True)
    except UserError as error:
        errors.print(f"fl-sim: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(2)
    except (RuntimeError, OSError, MemoryError) as error:
        where = f" ({users_line(error)})" if users_line(error) else ""
        errors.print(f"fl-sim: the run failed: {in_one_line(error)}{where}", style="red", soft_wrap=True, markup=False)
        sys.exit(1)
    except Exception as error:
        if not users_line(error):
            raise
        errors.print(f"fl-sim: the run failed: {told(error)}", style="red", soft_wrap=True, markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
