"""ServerApp and ClientApp for Flower's own runtimes: `flwr run`, or a SuperLink with SuperNodes.

A Flower app of two lines names `server` and `client` (see `examples/flower`). Its run config names the experiment:
`config` is the path of a TOML file that server and nodes can read, `overrides` are `key=value` pairs separated by
spaces. A finished run is refused unless `fresh` is true.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_sim.config.experiment import Experiment
from fl_sim.core.types import UserError
from fl_sim.runtime.client.host import ClientHost, client_app
from fl_sim.simulation.client_side import hosts_of
from fl_sim.simulation.earlier_runs import prepare
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.identity import Identity, hash_of
from fl_sim.simulation.loop import serve
from fl_sim.simulation.parts import check, check_built
from fl_sim.simulation.run_folder import claimed

server = ServerApp()


@lru_cache(maxsize=1)
def _federation(config: str, overrides: str) -> Federation:
    experiment = Experiment.load(config, overrides.split())
    check(experiment)
    federation = Federation.build(experiment)
    check_built(federation)
    return federation


def _of(context: Context) -> Federation:
    return _federation(str(context.run_config["config"]), str(context.run_config.get("overrides", "")))


@lru_cache(maxsize=1)
def _hosts(config: str, overrides: str) -> Callable[[Context], ClientHost]:
    return hosts_of(_federation(config, overrides))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment's rounds over whatever Grid the runtime gives."""
    federation = _of(context)
    experiment = federation.experiment.model_copy(update={"engine": "flower"})
    fresh = str(context.run_config.get("fresh", "false")).lower() == "true"
    with claimed(experiment) as folder:
        if folder.is_finished and not fresh:
            raise UserError(f"{folder.path}: already there; the run config's fresh = true runs it again")
        prepare(folder, resume=False, fresh=fresh)
        serve(federation, grid, folder, Identity.of(experiment, hash_of(federation.data)))


client = client_app(
    lambda context: _hosts(str(context.run_config["config"]), str(context.run_config.get("overrides", "")))(context)
)
