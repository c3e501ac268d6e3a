"""`fl-sim flower`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_sim.cli.screen import console, wide
from fl_sim.core.errors import UserError, shortened

if TYPE_CHECKING:
    from fl_sim.runtime.apps.project import Project
    from fl_sim.runtime.flower_run import AppRun

CLIENTS = 10
"""Nodes where neither the command line nor the app's file names a number."""
LONGEST = 100
"""Bytes of an app's name in the name of its run's folder; file systems take 143 to 255 in all."""


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
    _require_writable(out, project)
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


def _folder(out: Path, project: Project, run_id: int) -> Path:
    """The run's own folder, named after the app as far as a folder can have such a name."""
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in project.name)
    return out / f"flower-{kept.encode()[:LONGEST].decode(errors='ignore')}-{run_id:x}"


def _require_writable(out: Path, project: Project) -> None:
    """Refuse, before the run, a folder that could not be made after it; it is made for that, and removed again.

    Raises:
        UserError: it cannot be made.
    """
    folder, made = _folder(out.absolute(), project, run_id=2**64 - 1), list[Path]()
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a character that no path can have is a ValueError
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--out {shortened(str(out))}: no folder can be made there: {why}") from error
    finally:
        for place in made:
            with suppress(OSError, ValueError):  # not made, or not empty: another run's
                place.rmdir()


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

    folder = _folder(out, project, ran.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    ran.ledger.write(folder / "ledger.parquet")
    page = folder / "report.html"
    AppPage(project.name, facts, config, curves(ran.result), [*traffic(ran.ledger)], ran.failures).write(page)
    return page
