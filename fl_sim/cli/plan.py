"""`fl-sim plan`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_sim.cli.screen import console, errors, show
from fl_sim.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fl_sim.bench.cluster_costs import Measured
    from fl_sim.bench.cluster_model import Cluster, Memory, Round

MOST_NODES, MOST_WORKERS, MOST_CLIENTS = 100_000, 100_000, 10**10
PLANNED = (10**4, 10**5, 10**6, 10**7)
"""Clients of a federation, beside the config's own."""


def plan(
    config: Annotated[Path, typer.Argument(help="experiment as TOML, for instance configs/quickstart.toml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for instance cohort.size=20")] = None,
    nodes: Annotated[str, typer.Option(help="numbers of nodes, the head among them")] = "1,2,3,10,100,1000",
    workers: Annotated[
        int | None, typer.Option(help="workers of a node, one processor each; default: as this machine has processors")
    ] = None,
    mbps: Annotated[float, typer.Option(help="rate of a node's link, 10^6 bits a second each way")] = 1000.0,
    clients: Annotated[
        str, typer.Option(help="clients of the federation, for the memory; default: the config's, 10^4, ... 10^7")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress of the short run")] = False,
) -> None:
    """Predict a round on a Ray cluster: seconds, bytes across each link, memory of a node, and what bounds it.

    Up to five rounds of up to eight clients run on one worker of this machine, which should be idle, and are measured part by
    part. Of later rounds, for instance after pruning, nothing is predicted.

    Example: fl-sim plan configs/quickstart.toml --nodes 1,10,100 --workers 16 --mbps 10000
    """
    from fl_sim.bench.cluster_costs import measure
    from fl_sim.bench.cluster_model import Cluster, memory_of, round_on
    from fl_sim.config.experiment import Experiment
    from fl_sim.report.progress import display
    from fl_sim.simulation.sweep import integers

    numbers = _within("--nodes", integers("--nodes", nodes), 1, MOST_NODES)
    (each,) = _within("--workers", [workers or 0] if workers is not None else [os.cpu_count() or 1], 1, MOST_WORKERS)
    if not 0 < mbps < float("inf"):
        raise UserError(f"--mbps {mbps:g}: must be above 0")
    experiment = Experiment.load(config, overrides or [])
    own, cohort = experiment.data.clients, experiment.cohort.size
    asked = integers("--clients", clients) if clients else [own, *(count for count in PLANNED if count > own)]
    _within("--clients", asked, cohort, MOST_CLIENTS)
    with display(experiment, errors, quiet=quiet or not errors.is_terminal) as observer:
        measured = measure(experiment, observer)
    clusters = [Cluster(number, each, mbps) for number in numbers]
    rounds = [round_on(measured.costs, cluster, cohort) for cluster in clusters]
    memory = [memory_of(measured.costs, clusters[0], count) for count in asked]
    if as_json:
        console.print_json(_document(measured, clusters, cohort, rounds, memory))
        return
    modelled = round_on(measured.costs, Cluster(1, 1, mbps), measured.cohort).seconds
    for line in (
        f"{experiment.name}: {cohort} clients a round, {each} workers a node, links of {mbps:g} Mbit/s",
        f"short run, {measured.cohort} clients a round on one worker here: {measured.seconds:.3g} s a round; "
        f"the model says {modelled:.3g} s",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    show(_rounds_table(rounds))
    show(_memory_table(memory))


def _within(option: str, numbers: Sequence[int], least: int, most: int) -> Sequence[int]:
    for number in numbers:
        if not least <= number <= most:
            hint = " (a round's cohort)" if option == "--clients" and number < least else ""
            raise UserError(f"{option} {number}: must be from {least}{hint} to {most}")
    return numbers


def _document(
    measured: Measured, clusters: Sequence[Cluster], cohort: int, rounds: Sequence[Round], memory: Sequence[Memory]
) -> str:
    document = {
        "measured": dataclasses.asdict(measured),
        "cohort": cohort,
        "rounds": [
            {**dataclasses.asdict(cluster), **dataclasses.asdict(each), "bound": each.bound}
            for cluster, each in zip(clusters, rounds, strict=True)
        ],
        "memory": [dataclasses.asdict(each) for each in memory],
    }
    return json.dumps(document)


def _rounds_table(rounds: Sequence[Round]) -> Table:
    rows = [
        (
            str(each.nodes),
            *(f"{value:.3g}" for value in (each.seconds, each.compute_s, each.driver_s, each.link_s)),
            each.bound,
            *(_mb(size) for size in (each.node_down, each.node_up, each.head_down, each.head_up)),
        )
        for each in rounds
    ]
    heads = ("nodes", "s a round", "compute s", "driver s", "link s", "bound", "MB to a node", "from it")
    return _table("a round, by nodes", (*heads, "out of the head", "into it"), rows)


def _memory_table(memory: Sequence[Memory]) -> Table:
    rows = [
        (
            f"{each.clients:,}",
            *(_mb(size) for size in (each.driver_bytes, each.node_bytes, each.states_bytes)),
            f"{each.start_s:.3g}",
        )
        for each in memory
    ]
    heads = ("clients", "program MB", "a node's workers MB", "kept on disk MB", "start s")
    return _table("memory, by clients of as many samples each", heads, rows)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"
