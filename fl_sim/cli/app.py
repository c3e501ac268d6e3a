"""The command line, `fl-sim`. Exit status 0 done, 2 wrong input, 1 the run failed."""

from __future__ import annotations

import logging
import os
import re
import sys
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

import typer

from fl_sim.cli.advise import advise
from fl_sim.cli.bench import bench
from fl_sim.cli.flower import flower
from fl_sim.cli.plan import plan
from fl_sim.cli.reproduce import reproduce
from fl_sim.cli.results import compare, explain, replay, report
from fl_sim.cli.run import run, sweep
from fl_sim.cli.screen import errors
from fl_sim.cli.tools import doctor, init, list_, prune
from fl_sim.cli.watch import watch
from fl_sim.core.errors import USERS_OWN, UserError, error_line, in_one_line, users_line

if TYPE_CHECKING:
    import click

app = typer.Typer(
    name="fl-sim",
    help="Federated learning whose communication numbers are the bytes it encoded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (
    run,
    flower,
    sweep,
    reproduce,
    watch,
    report,
    explain,
    compare,
    replay,
    advise,
    plan,
    prune,
    doctor,
    init,
):
    app.command()(command)
app.command(name="list")(list_)
app.add_typer(bench, name="bench")


class _ToStderr(logging.Handler):
    """Lines go where stderr points when they come: a live display takes them in and shows them above its bars.

    What differs from the last line only in the client or the round is counted, and the count is shown at 10, 100, ... and
    at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last, self._repeats = "", 0

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        kind = re.sub(r"\b(client|round) \d+", r"\1 N", line)
        if kind == self._last and "client N" in kind:
            self._repeats += 1
            if self._repeats in (10, 100, 1000, 10_000, 100_000):
                print(f"  ... {self._repeats} more like it", file=sys.stderr)
            return
        self.settle()
        self._last = kind
        print(line, file=sys.stderr)

    def settle(self) -> None:
        """Say how often the last line came again."""
        if self._repeats:
            print(f"  ... {self._repeats} more like it, of other clients or rounds", file=sys.stderr)
        self._last, self._repeats = "", 0


def _version(asked: bool) -> None:
    if asked:
        print(f"fl-sim {version('fl-sim')}")
        raise typer.Exit


@app.callback()
def about(
    shown: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Federated learning whose communication numbers are the bytes it encoded."""


@cache
def parser() -> click.Command:
    """The parser of all commands, built once a process: reading their signatures takes longer than most of them."""
    return typer.main.get_command(app)


def main() -> None:
    """Entry point: turns wrong input into one line and status 2, a failed run into one line and status 1."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    sys.path.insert(0, os.getcwd())
    lines = _ToStderr()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[lines])
    try:
        try:
            parser()(standalone_mode=True)
        finally:
            lines.settle()
    except UserError as error:
        errors.print(f"fl-sim: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(2)
    except (RuntimeError, OSError, MemoryError) as error:
        where = f" ({users_line(error)})" if users_line(error) else ""
        errors.print(f"fl-sim: the run failed: {in_one_line(error)}{where}", style="red", soft_wrap=True, markup=False)
        sys.exit(1)
    except USERS_OWN as error:  # every command ends by SystemExit; one that left a file of the user's was not meant so
        if not users_line(error):
            raise
        errors.print(f"fl-sim: the run failed: {error_line(error)}", style="red", soft_wrap=True, markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
