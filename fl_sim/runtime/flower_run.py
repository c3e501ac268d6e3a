"""Somebody's Flower app, unchanged, on our engines and ledger.

from my_app import client_app, server_app
ledger = run_apps(server_app, client_app, num_clients=10)
print(ledger.total(by=("direction",)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fl_sim.communication.ledger import Ledger
from fl_sim.core.lookup import find
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.grids.booking import BookedGrid
from fl_sim.runtime.grids.inline import InlineGrid
from fl_sim.runtime.grids.ray import RayGrid

Scalar = bool | int | float | str


@dataclass(frozen=True)
class _Given:
    """A ClientApp, as the factory that a worker process calls."""

    app: ClientApp

    def __call__(self) -> ClientApp:
        return self.app


def _inline(app: ClientApp, num_clients: int) -> LocalGrid:
    return InlineGrid(app, num_clients)


def _ray(app: ClientApp, num_clients: int) -> LocalGrid:
    return RayGrid(_Given(app), num_clients)


ENGINES: Mapping[str, Callable[[ClientApp, int], LocalGrid]] = {"inline": _inline, "ray": _ray}


def run_apps(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_clients: int,
    engine: str = "inline",
    run_config: Mapping[str, Scalar] | None = None,
) -> Ledger:
    """Run a message-API ServerApp with its ClientApp, and book every array that moves as dense bytes.

    Clients find `partition-id` and `num-partitions` in their `context.node_config`, as in Flower's simulation.

    Args:
        server_app, client_app: as `flwr run` would start them; on Ray the client app travels to the workers.
        num_clients: nodes.
        engine: "inline" or "ray".
        run_config: what `context.run_config` holds on both sides.

    Returns:
        The ledger; its "dense" rows are the lengths of the arrays as Flower serialised them.

    Raises:
        UserError: no such engine.
    """
    ledger, config = Ledger(), dict(run_config or {})
    with closing(find("engine", engine, ENGINES)(client_app, num_clients)) as grid:
        for context in grid.contexts.values():
            context.run_config = dict(config)
        server = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        server_app(BookedGrid(grid, ledger), server)
    return ledger
