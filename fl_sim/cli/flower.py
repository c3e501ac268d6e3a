"""`fl-sim flower`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_sim.cli.screen import console, wide
from fl_sim.core.errors import UserError

if TYPE_CHECKING:
    from fl_sim.runtime.apps.project import Project
    from fl_sim.runtime.flower_run import AppRun

CLIENTS = 10
"""Nodes where neither the command line nor the app's file names a number."""


def flower(
    path: Annotated[Path, typer.Argument(help="folder of a Flower app, with its pyproject.toml")],
    clients: Annotated[
        int | None, typer.Option(help=f"nodes; default: num-supernodes of the app's pyproject.toml, else {CLIENTS}")
    ] = None,
    engine: Annotated[str, typer.Option(help="inline, workers or ray")] = "inline",
    run_config: Annotated[
        list[str] | None, typer.Option(help="key=value pairs that replace [tool.flwr.app.config], or a TOML file")
    ] = None,
    node_config: Annotated[
        str, typer.Option(help="key=value pairs for every node; {partition} in a string stands for its number")
    ] = "",
    seed: Annotated[int, typer.Option(help="of the global generators of ServerApp and clients")] = 0,
    out: Annotated[Path, typer.Option(help="folder that receives the run's folder")] = Path("runs"),
) -> None:
    """Run any Flower app, unchanged, and show its result and every byte that moved.

    Example: fl-sim flower my_app --clients 20 --run-config 'num-server-rounds=5'
    """
    from fl_sim.runtime.apps.project import Project, pairs
    from fl_sim.runtime.flower_run import run_apps

    project = Project.read(path)
    config = project.configured(" ".join(run_config or ()))
    nodes = dict(pairs(node_config, "--node-config"))
    count = next(number for number in (clients, project.clients, CLIENTS) if number is not None)
    _require_writable(out)
    server, client = project.load()
    start = time.perf_counter()
    with _printed_once():
        ran = run_apps(
            server,
            client,
            num_clients=count,
            engine=engine,
            run_config=config,
            node_config=_by_partition(nodes),
            seed=seed,
        )
    facts = {
        "app": str(path),
        "engine": engine,
        "clients": str(count),
        "seed": str(seed),
        "seconds": f"{time.perf_counter() - start:.1f}",
        "run": f"{ran.run_id:x}",
    }
    _show(ran)
    console.print(_written(project, ran, config, facts, out), highlight=False, soft_wrap=True)


def _require_writable(out: Path) -> None:
    """Refuse, before the run, a folder that could not be written after it."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--out {out}: {place} is no folder that can be written")


@contextmanager
def _printed_once() -> Iterator[None]:
    """Flower's logger prints its lines itself, so that the program's own handler must not print them again."""
    flowers = logging.getLogger("flwr")
    before, flowers.propagate = flowers.propagate, False
    try:
        yield
    finally:
        flowers.propagate = before


def _by_partition(
    nodes: Mapping[str, bool | int | float | str],
) -> Callable[[int], Mapping[str, bool | int | float | str]]:
    def filled(partition: int) -> Mapping[str, bool | int | float | str]:
        number = str(partition)
        return {k: v.replace("{partition}", number) if isinstance(v, str) else v for k, v in nodes.items()}

    return filled


def _show(ran: AppRun) -> None:
    from rich.table import Table

    from fl_sim.runtime.apps.numbers import curves, traffic

    found = curves(ran.result)
    if found:
        table = Table("metric", "first", "last", "round", title="Result")
        for name, values in found.items():
            first, last = min(values), max(values)
            table.add_row(name, f"{values[first]:.5g}", f"{values[last]:.5g}", str(last))
        console.print(table)
    table = Table("phase", "direction", "messages", "arrays B", "configs B", "metrics B", "protocol B", title="Traffic")
    for row in traffic(ran.ledger):
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in row))
    wide(100).print(table)
    for reason, times in ran.failures.items():
        console.print(f"error reply, {times} times: {reason}", style="red", markup=False, soft_wrap=True)


def _written(project: Project, ran: AppRun, config: Mapping[str, object], facts: Mapping[str, str], out: Path) -> Path:
    """Write ledger and page into a folder of the run's own; returns the page's path."""
    from fl_sim.report.flower_page import AppPage
    from fl_sim.runtime.apps.numbers import curves, traffic

    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in project.name)
    folder = out / f"flower-{name}-{ran.run_id:x}"
    folder.mkdir(parents=True, exist_ok=True)
    ran.ledger.write(folder / "ledger.parquet")
    page = folder / "report.html"
    AppPage(project.name, facts, config, curves(ran.result), [*traffic(ran.ledger)], ran.failures).write(page)
    return page
