"""ServerApp and ClientApp for Flower's own runtimes: `flwr run`, or a SuperLink with SuperNodes.

A Flower app of two lines names `server` and `client` (see `examples/flower`). Its run config names the experiment:
`config` is the path of a TOML file that server and nodes can read, `overrides` are `key=value` pairs separated by
spaces. A finished run is refused unless `fresh` is true. The federation must have `data.clients` nodes. The run's folder is
`<out>/<name>-flower-<id>`, so that a run on an engine of ours keeps its own.
"""

from __future__ import annotations

import logging
import time
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
from fl_sim.simulation.identity import Identity, hash_of, test_hashes
from fl_sim.simulation.loop import serve
from fl_sim.simulation.parts import check, check_built
from fl_sim.simulation.run_folder import claimed

NODES_S = 30.0
"""How long nodes may take to join."""
log = logging.getLogger("fl_sim")
server = ServerApp()


@lru_cache(maxsize=1)
def _federation(config: str, overrides: str) -> Federation:
    experiment = Experiment.load(config, overrides.split())
    check(experiment)
    federation = Federation.build(experiment)
    check_built(federation)
    return federation


def _of(context: Context) -> Federation:
    if "config" not in context.run_config:
        raise UserError('the run config lacks config = "path of a TOML file"')
    return _federation(str(context.run_config["config"]), str(context.run_config.get("overrides", "")))


@lru_cache(maxsize=1)
def _hosts(config: str, overrides: str) -> Callable[[Context], ClientHost]:
    return hosts_of(_federation(config, overrides))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment's rounds over whatever Grid the runtime gives.

    Raises:
        UserError: no such config, another number of nodes than clients, or a finished run; said in one line before.
    """
    try:
        _serve(grid, context)
    except UserError as error:
        log.error("fl-sim: %s", error)
        raise UserError(str(error)) from None


def _serve(grid: Grid, context: Context) -> None:
    federation = _of(context)
    asked = federation.experiment
    require_nodes(grid, asked.data.clients)
    experiment = asked.model_copy(update={"engine": "flower", "name": f"{asked.name}-flower"})
    fresh = str(context.run_config.get("fresh", "false")).lower() == "true"
    with claimed(experiment) as folder:
        if folder.is_finished and not fresh:
            raise UserError(f"{folder.path}: already there; the run config's fresh = true runs it again")
        prepare(folder, resume=False, fresh=fresh)
        serve(
            federation,
            grid,
            folder,
            Identity.of(federation.code, hash_of(federation.data), test_hashes(federation.data)),
        )


def require_nodes(grid: Grid, clients: int, *, seconds: float = NODES_S) -> None:
    """Wait until a federation has a node for each client.

    Raises:
        UserError: it has more nodes, or fewer after these seconds.
    """
    end = time.monotonic() + seconds
    while (count := len(list(grid.get_node_ids()))) < clients and time.monotonic() < end:
        time.sleep(min(0.2, seconds))
    if count != clients:
        raise UserError(
            f"the federation has {count} nodes and the config data.clients = {clients}: start as many "
            f"(flwr run ... --federation-config num-supernodes={clients}), or override data.clients={count}"
        )


client = client_app(
    lambda context: _hosts(str(context.run_config["config"]), str(context.run_config.get("overrides", "")))(context)
)
