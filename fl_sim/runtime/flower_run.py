"""Somebody's Flower app, unchanged, on our engines and ledger.

from my_app import client_app, server_app
ran = run_apps(server_app, client_app, num_clients=10)
print(ran.result)                                   # what the strategy returned
print(ran.ledger.total(by=("direction",)))
"""

from __future__ import annotations

import gc
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fl_sim.communication.flower_private import identified, results_recorded
from fl_sim.communication.ledger import Ledger
from fl_sim.core.errors import UserError
from fl_sim.core.lookup import find
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.core.seeding import Purpose, derive
from fl_sim.runtime.apps.actors import actor_lanes
from fl_sim.runtime.apps.client import InlineLane, Lane
from fl_sim.runtime.apps.grid import AppGrid, Scalar
from fl_sim.runtime.apps.processes import can_fork, forked
from fl_sim.runtime.grids.base import FIRST_NODE
from fl_sim.runtime.grids.workers import cores

MOST_CLIENTS = 10_000_000
NodeConfig = Mapping[str, Scalar] | Callable[[int], Mapping[str, Scalar]]
_RUNNING = threading.Lock()


@dataclass(frozen=True)
class AppRun:
    """What a Flower app's run left.

    Attributes:
        result: what the last strategy returned: Flower's `Result`, or the `History` of a legacy server; None where the
            ServerApp uses no strategy of Flower's.
        state: the ServerApp's `context.state`.
        client_states: partition -> that client's `context.state`, of the clients that took part.
        ledger: every message that moved; sections "dense" (arrays), "config" and "metrics", as Flower serialises them.
        failures: reason of an error reply -> how often it came.
        run_id: the number that ServerApp and clients saw.
    """

    result: object
    state: RecordDict
    client_states: Mapping[int, RecordDict]
    ledger: Ledger
    failures: Mapping[str, int]
    run_id: int


Lanes = tuple[Sequence[Lane], Sequence[Lane]]
"""Those that take all messages, and spare ones."""


@contextmanager
def _inline(app: ClientApp, num_clients: int, run_id: int) -> Iterator[Lanes]:
    yield [InlineLane(app)], (forked(app, 1) if can_fork() and num_clients > 1 else [])


@contextmanager
def _workers(app: ClientApp, num_clients: int, run_id: int) -> Iterator[Lanes]:
    yield forked(app, min(cores(), num_clients)), []


@contextmanager
def _ray(app: ClientApp, num_clients: int, run_id: int) -> Iterator[Lanes]:
    with actor_lanes(app, num_clients, run_id) as lanes:
        yield lanes, []


ENGINES: Mapping[str, Callable[[ClientApp, int, int], AbstractContextManager[Lanes]]] = {
    "inline": _inline,
    "workers": _workers,
    "ray": _ray,
}


def run_apps(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_clients: int,
    engine: str = "inline",
    run_config: Mapping[str, Scalar] | None = None,
    node_config: NodeConfig | None = None,
    seed: int | None = None,
) -> AppRun:
    """Run a ServerApp with its ClientApp, of the message API or legacy, and book every message that moves.

    Clients find `partition-id` and `num-partitions` in their `context.node_config`, as in Flower's simulation. Each call of
    a client has global generators of its own, which depend on seed, partition and the number of the client's message alone.

    Args:
        server_app, client_app: as `flwr run` would start them; on Ray the client app travels to the workers.
        num_clients: nodes.
        engine: "inline", "workers" (forked processes, a core each) or "ray".
        run_config: what `context.run_config` holds on both sides.
        node_config: further keys of `context.node_config`, the same for all clients or by partition.
        seed: of the clients' global generators (None = 0); given, also of the ServerApp's, which else are left alone.

    Raises:
        UserError: wrong arguments, or another app is running in this process: Flower has one run a process.
        Exception: what the ServerApp raised.
    """
    _require_apps(server_app, client_app, num_clients, seed)
    config, nodes = _scalars("run_config", run_config or {}), _node_configs(node_config)
    if not _RUNNING.acquire(blocking=False):
        raise UserError("run_apps: another Flower app runs in this process; one at a time")
    run_id = 2**62 + secrets.randbits(61)  # all of one length on the wire
    try:
        with ExitStack() as stack:
            stack.enter_context(unchanged_settings())
            stack.enter_context(identified(run_id))
            stack.enter_context(_short_collections())
            lanes, spare = stack.enter_context(find("engine", engine, ENGINES)(client_app, num_clients, run_id))
            grid = AppGrid(
                lanes,
                num_clients,
                spare=spare,
                run_id=run_id,
                run_config=config,
                node_config=nodes,
                seed=seed or 0,
            )
            stack.callback(grid.close)
            results = stack.enter_context(results_recorded())
            if seed is not None:
                stack.enter_context(seeded(derive(seed, Purpose.COHORT)))
            server = Context(run_id, 1, {}, RecordDict(), dict(config))
            server_app(grid, server)
            grid.finish()
    finally:
        _RUNNING.release()
    states = {node - FIRST_NODE: context.state for node, context in sorted(grid.contexts.items())}
    result = results[-1] if results else None
    return AppRun(result, server.state, states, grid.book.written(), dict(grid.failures), run_id)


@contextmanager
def _short_collections() -> Iterator[None]:
    """Leave what is there before the block out of its garbage collections; processes forked in it inherit that.

    A full one takes a quarter of a second where PyTorch is imported, and Flower starts one in every
    `to_numpy_ndarrays(keep_input=False)`.
    """
    frozen = gc.get_freeze_count()
    if frozen:  # by the program: what is frozen here stays so, and must be no garbage
        gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def _require_apps(server_app: object, client_app: object, num_clients: object, seed: object) -> None:
    for name, app, kind in (("server_app", server_app, ServerApp), ("client_app", client_app, ClientApp)):
        if not isinstance(app, kind):
            raise UserError(f"run_apps: {name} is a {type(app).__name__}, not a {kind.__name__}")
    if not isinstance(num_clients, int) or not 1 <= num_clients <= MOST_CLIENTS:
        raise UserError(f"run_apps: num_clients = {num_clients!r}: must be a whole number from 1 to {MOST_CLIENTS:,}")
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise UserError(f"run_apps: seed = {seed!r}: must be a whole number from 0 on, or None")


def _scalars(where: str, config: Mapping[str, Scalar]) -> Mapping[str, Scalar]:
    """The config, checked: Flower's configs hold strings, numbers and booleans by string keys."""
    for key, value in config.items():
        if not isinstance(key, str) or not isinstance(value, (bool, int, float, str)):
            raise UserError(f"run_apps: {where}[{key!r}] is a {type(value).__name__}; allowed: bool, int, float, str")
    return config


def _node_configs(node_config: NodeConfig | None) -> Callable[[int], Mapping[str, Scalar]]:
    if node_config is None:
        return lambda partition: {}
    if not callable(node_config):
        same = _scalars("node_config", node_config)
        return lambda partition: same
    by_partition = node_config
    return lambda partition: _scalars(f"node_config({partition})", by_partition(partition))
