"""The commands `fl-sim bench ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fl_sim.cli.screen import console, wide
from fl_sim.core.errors import UserError

bench = typer.Typer(no_args_is_help=True, help="Benchmarks that anyone can rerun. Run them on an idle machine.")
AS_JSON = Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")]


@bench.command()
def engine(
    as_json: AS_JSON = False,
    as_markdown: Annotated[bool, typer.Option("--table", help="print a Markdown table")] = False,
    only: Annotated[
        str,
        typer.Option(
            help="parts, with commas: b0, small, resnet32, overhead, rates, idle, memory, start, tasks, flower, app, scale, fold"
        ),
    ] = "",
    with_flower: Annotated[
        bool, typer.Option("--with-flower", help="also Flower's own simulation of the same apps")
    ] = False,
    repeats: Annotated[int, typer.Option(min=2, help="alternated repetitions")] = 15,
    peers: Annotated[
        str,
        typer.Option(
            "--with", help="other libraries beside ours, and no other part: pfl, flower, fedjax, each with =PYTHON"
        ),
    ] = "",
    work: Annotated[str, typer.Option(help="what they do, comma-separated: b0, small, mlp")] = "b0,small,mlp",
) -> None:
    """The engines beside the same SGD steps in bare PyTorch, overheads, idle workers, start-up and memory.

    Example: fl-sim bench engine --only b0,small --repeats 5 --table

    With other federated libraries, each in a Python that has it (a third of the repetitions are turns, each alone):

    Example: fl-sim bench engine --with pfl=PLACE/bin/python,flower --work b0
    """
    from fl_sim.bench import engine as measured
    from fl_sim.bench.show import markdown, show

    if peers:
        if only or with_flower:
            raise UserError("--with measures other libraries alone: leave --only and --with-flower out")
        _with_peers(peers, work, turns=max(2, repeats // 3), as_json=as_json, as_markdown=as_markdown)
        return
    parts = only.split(",") if only else list(measured.PARTS)
    found = measured.results([*parts, *(measured.OPTIONAL if with_flower else ())], repeats=repeats)
    if as_markdown:
        typer.echo(markdown(found))
    else:
        show(console, found, as_json=as_json)


def _with_peers(peers: str, works: str, *, turns: int, as_json: bool, as_markdown: bool) -> None:
    from fl_sim.bench import peer_run, peer_table
    from fl_sim.bench.show import rows_as_markdown, show_rows

    asked = peer_run.asked(peers)
    rows = peer_table.measure(asked, works.split(","), turns=turns)
    if as_json:
        show_rows(console, rows, as_json=True)
        return
    if as_markdown:
        typer.echo(rows_as_markdown(rows))
    else:
        show_rows(wide(130), rows, as_json=False)
    for line in peer_table.notes(asked):
        typer.echo(f"- {line}")


@bench.command(name="cohort")
def cohort_(
    device: Annotated[str, typer.Option(help="cuda; cpu shows that it runs, not how fast it can be")] = "cuda",
    models: Annotated[str, typer.Option(help="names of `fl-sim list models`")] = "cnn,resnet20,resnet32",
    cohorts: Annotated[str, typer.Option(help="clients trained together")] = "1,4,16,64,256",
    batch_sizes: Annotated[str, typer.Option(help="samples in a step of one client")] = "10,64",
    as_json: AS_JSON = False,
) -> None:
    """The cohort engine's training on a GPU beside the same clients one after the other in bare PyTorch.

    Example: fl-sim bench cohort --models cnn --cohorts 1,64 --batch-sizes 10
    """
    from fl_sim.bench import cohort as measured
    from fl_sim.bench.show import show_rows
    from fl_sim.simulation.sweep import integers

    grid = measured.Grid(
        tuple(models.split(",")), integers("--cohorts", cohorts), integers("--batch-sizes", batch_sizes)
    )
    show_rows(console, measured.measure(device, grid), as_json=as_json)


@bench.command()
def tiny(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for other codecs and masks")] = None,
    models: Annotated[
        str, typer.Option(help="mlp, logistic, cnn, gru, cnn_bn, mlp_784; comma-separated")
    ] = "mlp,logistic,cnn,gru,mlp_784",
    cohorts: Annotated[str, typer.Option(help="clients of a round, up to 300")] = "64,256",
    steps: Annotated[int, typer.Option(min=1, help="SGD steps of ten samples of a client in a round")] = 5,
    beside: Annotated[str, typer.Option(help="the other engine: inline, or workers (two processes)")] = "inline",
    processor_time: Annotated[
        bool, typer.Option("--processor-time", help="seconds of the processors, for a machine with other work")
    ] = False,
    repeats: Annotated[int, typer.Option(min=2, help="alternated repetitions")] = 9,
    as_json: AS_JSON = False,
) -> None:
    """Whole rounds of tiny models on the cohort engine and on another one, in turn, on the CPU.

    Example: fl-sim bench tiny --models mlp --cohorts 256 wire.uplink.values=int8
    """
    from fl_sim.bench import tiny as measured
    from fl_sim.bench.show import show
    from fl_sim.simulation.sweep import integers

    found = measured.measure(
        works=models.split(","),
        cohorts=integers("--cohorts", cohorts),
        repeats=repeats,
        overrides=overrides or [],
        steps=steps,
        beside=beside,
        processor_time=processor_time,
    )
    show(console, found, as_json=as_json)


@bench.command()
def codec(
    as_json: AS_JSON = False,
    updates: Annotated[
        Path | None,
        typer.Option(help="folder of a run with wire.record_payloads = 1: its updates instead of drawn ones"),
    ] = None,
) -> None:
    """Payload sizes against the entropy floor, and speeds, beside COO, bitmaps and npz.

    Example: fl-sim bench codec --updates runs/quickstart-bc58d0c5
    """
    from fl_sim.bench import codec as measured
    from fl_sim.bench.show import show_rows

    if updates is None:
        show_rows(console, measured.measure(), as_json=as_json)
        return
    from fl_sim.bench import recorded
    from fl_sim.report import Report

    show_rows(console, recorded.measure(Report.load(updates)), as_json=as_json)


@bench.command()
def inference(
    as_json: AS_JSON = False,
    model: Annotated[str, typer.Option(help="see `fl-sim list models`")] = "resnet32",
    budget: Annotated[float, typer.Option(help="share of the plain model's MACs, gates included")] = 0.5,
    gates: Annotated[
        list[str] | None, typer.Option(help="gated layers, one pattern each; several are compared")
    ] = None,
    side: Annotated[int, typer.Option(min=4, help="pixels a side")] = 32,
    repeats: Annotated[int, typer.Option(min=2, help="alternated repetitions")] = 200,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Latency of one image: the dense model beside the gated one that skips its off channels, on one core or a GPU."""
    from fl_sim.bench import inference as measured
    from fl_sim.bench.show import show_rows

    chosen = gates or ["*", "*.conv1"]
    rows = measured.measure(model=model, budget=budget, gates=chosen, side=side, repeats=repeats, device=device)
    show_rows(console, rows, as_json=as_json)


@bench.command(name="pruned-training")
def pruned_training(
    as_json: AS_JSON = False,
    model: Annotated[str, typer.Option(help="see `fl-sim list models`")] = "resnet32",
    budgets: Annotated[str, typer.Option(help="shares of the plain model's MACs")] = "0.5,0.25",
    precisions: Annotated[
        str, typer.Option(help="float32, channels_last, bfloat16")
    ] = "float32,channels_last,bfloat16",
    gates: Annotated[str, typer.Option(help="gated layers, a pattern")] = "*",
    repeats: Annotated[int, typer.Option(min=2, help="alternated repetitions")] = 9,
) -> None:
    """Rounds whose clients cut off channels out before they train, beside masked and dense training.

    Example: fl-sim bench pruned-training --precisions float32 --repeats 5
    """
    from dataclasses import replace

    from fl_sim.bench import pruned_training as measured
    from fl_sim.bench.show import show
    from fl_sim.simulation.sweep import decimals

    found = measured.measure(
        budgets=decimals("--budgets", budgets),
        precisions=precisions.split(","),
        repeats=repeats,
        gates=gates,
        work=replace(measured.WORK, model=model),
    )
    show(console, found, as_json=as_json)


@bench.command()
def pruning(
    as_json: AS_JSON = False,
    additivity: Annotated[bool, typer.Option("--additivity", help="compare joint and predicted distortion")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="model for --additivity; default: one trained here")] = None,
    calibration: Annotated[str, typer.Option(help="data source for --additivity")] = "digits",
    images: Annotated[int, typer.Option(help="calibration images for --additivity")] = 128,
    weights: Annotated[
        str, typer.Option(help="sizes to select from; 100000000 takes 6 GB, most of it torch's own pruning")
    ] = "500000,11000000",
) -> None:
    """Global selection beside torch's own pruning, and the growth of the rate-distortion program."""
    from fl_sim.bench import additivity as adding
    from fl_sim.bench import pruning as measured
    from fl_sim.bench.show import show_rows
    from fl_sim.simulation.sweep import integers

    if additivity:
        show_rows(console, adding.measure(checkpoint=checkpoint, source=calibration, images=images), as_json=as_json)
    else:
        show_rows(console, measured.measure(weights=integers("--weights", weights)), as_json=as_json)


@bench.command()
def density(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a finished run, or a model file")],
    source: Annotated[str, typer.Option(help="data that calibrates, retrains and tests")] = "digits",
    methods: Annotated[
        str, typer.Option(help="of `fl-sim prune`, comma-separated; +N = each layer keeps N weights at least")
    ] = "uniform,erk,lamp,global,global+10,rd",
    densities: Annotated[str, typer.Option(help="comma-separated; 1 is the model as it is")] = "0.5,0.2,0.1,0.05,0.02",
    images: Annotated[int, typer.Option(help="calibration images for rd")] = 64,
    levels: Annotated[int, typer.Option(help="points of a distortion curve for rd")] = 101,
    steps: Annotated[int, typer.Option(min=0, help="of training under the mask; 0 = none")] = 0,
    lr: Annotated[float, typer.Option(help="of that training: SGD, momentum 0.9, batch 64, cosine")] = 0.05,
    precision: Annotated[str, typer.Option(help="float32, channels_last, bfloat16")] = "float32",
    as_json: AS_JSON = False,
) -> None:
    """Accuracy, empty layers, MACs and bytes of one model by density and method, before and after retraining.

    Example: fl-sim bench density runs/quickstart-1a2b3c4d --methods global,global+10 --densities 0.01,0.001 --steps 100
    """
    from fl_sim.bench import density as measured
    from fl_sim.bench.show import show_rows
    from fl_sim.core.lookup import find
    from fl_sim.simulation.sweep import decimals
    from fl_sim.training.loop import Training
    from fl_sim.training.precision import PRECISIONS

    find("--precision", precision, PRECISIONS)
    options = {"lr": lr, "momentum": 0.9, "batch_size": 64, "schedule": "cosine", "precision": precision}
    rows = measured.measure(
        checkpoint,
        source,
        methods=[measured.Asked.of(text) for text in methods.split(",")],
        densities=decimals("--densities", densities),
        images=images,
        levels=levels,
        precision=precision,
        training=Training(steps=steps, **options) if steps else None,  # type: ignore[arg-type]
    )
    show_rows(console, list(rows), as_json=as_json)


@bench.command()
def soak(
    as_json: AS_JSON = False,
    rounds: Annotated[int, typer.Option(min=1, help="rounds on each engine; the first third warms up")] = 300,
    clients: Annotated[int, typer.Option(min=1, help="clients of the federation")] = 1000,
    cohort: Annotated[int, typer.Option(min=1, help="clients a round")] = 100,
    engines: Annotated[str, typer.Option(help="which, each in a process of its own")] = "inline,workers,ray",
) -> None:
    """Long runs of a tiny model: the growth of memory, and what is left behind when they are over.

    Each engine's table is printed when it is done.
    """
    from fl_sim.bench import soak as measured
    from fl_sim.bench.show import show

    for table in measured.results(engines.split(","), rounds=rounds, clients=clients, cohort=cohort):
        show(console, table, as_json=as_json)


@bench.command()
def memory(
    as_json: AS_JSON = False,
    millions: Annotated[float, typer.Option(min=0.01, help="parameters of the model, in millions")] = 100.0,
    clients: Annotated[int, typer.Option(min=1, max=300, help="clients a round")] = 3,
    client: Annotated[str, typer.Option(help="what they do: nudge (add a number), sgd (train)")] = "nudge",
    resume: Annotated[bool, typer.Option("--resume", help="of a run that goes on from a checkpoint")] = False,
) -> None:
    """Peak memory of a whole run of a large model on the inline engine, over its float32 parameters.

    Example: fl-sim bench memory --millions 10 --client sgd
    """
    from fl_sim.bench import memory as measured
    from fl_sim.bench.show import show

    if client not in measured.CLIENTS:
        raise UserError(f"--client {client!r}: allowed: {', '.join(measured.CLIENTS)}")
    load = measured.Load(millions, clients, client, resume)
    show(console, measured.over_model(load), as_json=as_json)


@bench.command(name="async")
def async_(
    as_json: AS_JSON = False,
    updates: Annotated[int, typer.Option(min=1, help="updates that arrive at the server")] = 100_000,
    buffer: Annotated[int, typer.Option(min=1, help="updates of a server step")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, help="clients that train at a time, of 10,000")] = 1000,
    engines: Annotated[
        str, typer.Option(help="comma-separated; workers:2: two")
    ] = "inline,workers:1,workers:2,workers:3",
) -> None:
    """An asynchronous federation of 10,000 clients that do next to nothing, of a model of 50,624 parameters: FedBuff.

    Parameters, ledger and clock are the same on all engines, which the command checks.

    Example: fl-sim bench async --updates 1000 --engines inline,workers:2
    """
    from fl_sim.bench import asynchrony as measured
    from fl_sim.bench.show import show_rows

    rows = list(measured.measure(engines.split(","), updates=updates, buffer=buffer, concurrency=concurrency))
    show_rows(wide(130), rows, as_json=as_json)
    measured.require_equal(rows)


@bench.command()
def watch(
    config: Annotated[Path, typer.Argument(help="experiment as TOML; a run of it should take ten seconds or more")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="pairs of runs")] = 5,
    block: Annotated[int, typer.Option(min=1, help="rounds after which the page opens or closes")] = 20,
    browser: Annotated[
        bool, typer.Option("--browser", help="a real Chromium shows the page, and paints it; else its requests only")
    ] = False,
    as_json: AS_JSON = False,
) -> None:
    """What an open live page costs: the same rounds with one and without, in turn.

    Without --browser, a process sends the page's requests and nothing is painted. What opening costs once is not counted.

    Example: fl-sim bench watch configs/quickstart.toml rounds=100 --browser
    """
    from fl_sim.bench.show import show
    from fl_sim.cli.watch_cost import cost
    from fl_sim.config.experiment import Experiment

    experiment = Experiment.load(config, overrides or [])
    show(console, cost(experiment, repeats=repeats, block=block, browser=browser), as_json=as_json)
