"""The command line, `fl-sim`. Exit status 0 done, 2 wrong input, 1 the run failed."""

from __future__ import annotations

import logging
import os
import sys

import typer

from fl_sim.cli.bench import bench
from fl_sim.cli.results import compare, replay, report
from fl_sim.cli.run import run, sweep
from fl_sim.cli.screen import errors
from fl_sim.cli.tools import doctor, init, list_, prune
from fl_sim.core.errors import UserError, in_one_line, told, users_line

app = typer.Typer(
    name="fl-sim",
    help="Federated learning whose communication numbers are the bytes it encoded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (run, sweep, report, compare, replay, prune, doctor, init):
    app.command()(command)
app.command(name="list")(list_)
app.add_typer(bench, name="bench")


class _ToStderr(logging.Handler):
    """Lines go where stderr points when they come: a live display takes them in and shows them above its bars."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


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
