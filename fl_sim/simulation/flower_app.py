"""The same apps for Flower's own runtimes: `flwr run`, or a SuperLink with SuperNodes.

A Flower app of two lines names `server` and `client` (see `examples/flower`). Its run config names the experiment:
`config` is the path of a TOML file that server and nodes can read, `overrides` are `key=value` pairs separated by
spaces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.runtime.client.host import ClientHost, client_app
from fl_sim.simulation.federation import Federation, resolved
from fl_sim.simulation.parts import check, check_built
from fl_sim.simulation.run_folder import claimed, clear, scratch
from fl_sim.simulation.server import Session

server = ServerApp()


@lru_cache(maxsize=1)
def _federation(config: str, overrides: str) -> Federation:
    experiment = Experiment.load(config, overrides.split())
    check(experiment)
    federation = Federation.build(experiment)
    check_built(federation)
    return replace(federation, experiment=resolved(experiment, federation))


def _of(context: Context) -> Federation:
    return _federation(str(context.run_config["config"]), str(context.run_config.get("overrides", "")))


@lru_cache(maxsize=1)
def _hosts(config: str, overrides: str) -> Callable[[Context], ClientHost]:
    return _federation(config, overrides).hosts()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment's rounds over whatever Grid the runtime gives."""
    federation = _of(context)
    experiment = federation.experiment.model_copy(update={"engine": "flower"})
    with claimed(experiment) as folder, scratch(folder) as rows:
        session = Session(experiment, federation, folder, Ledger(rows))
        clear(folder)
        session.serve(grid)
        session.finish()


client = client_app(
    lambda context: _hosts(str(context.run_config["config"]), str(context.run_config.get("overrides", "")))(context)
)
