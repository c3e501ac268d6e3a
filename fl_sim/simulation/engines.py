"""The engines by name: which Grid carries a federation's messages, and which one `engine = "auto"` means."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial

import torch
from flwr.clientapp import ClientApp

from fl_sim.config.experiment import Engine, Experiment
from fl_sim.core.types import UserError
from fl_sim.runtime.by_value import pack
from fl_sim.runtime.client.host import client_app
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.grids.cohort import CohortGrid
from fl_sim.runtime.grids.inline import InlineGrid
from fl_sim.runtime.grids.ray import RayGrid
from fl_sim.runtime.grids.workers import WorkersGrid, cores
from fl_sim.simulation.client_side import client_of, hosts_of, make_client_app
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.identity import parts_of
from fl_sim.simulation.user_code import own_code

FEW = 4
"""A smaller cohort is over before further processes have paid for their start."""


@contextmanager
def open_grid(federation: Federation) -> Iterator[LocalGrid]:
    """Start the engine of an experiment; it is closed at the end of the block.

    Raises:
        UserError: Flower's own runtimes are started by `flwr run`.
    """
    engine = federation.experiment.engine
    factory = ENGINES.get(engine)
    if factory is None:
        raise UserError(
            f"engine = {engine!r} is started by Flower: flwr run examples/flower; here: {', '.join(ENGINES)}"
        )
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with closing(factory(federation)) as grid:
        yield grid


def _inline(federation: Federation) -> LocalGrid:
    timeout_s = federation.experiment.faults.timeout_s
    return InlineGrid(client_app(hosts_of(federation)), len(federation.partitions), timeout_s=timeout_s)


def _cohort(federation: Federation) -> LocalGrid:
    experiment = federation.experiment
    if experiment.faults.timeout_s is not None:
        raise UserError("faults.timeout_s: clients that train together have no time of their own; use another engine")
    hosts = hosts_of(federation)
    return CohortGrid(client_app(hosts), hosts, len(federation.partitions), chunk=experiment.cohort.chunk)


def _ray(federation: Federation) -> LocalGrid:
    experiment, sizes = federation.experiment, federation.sizes
    _check_client(federation)
    faults = experiment.faults
    return RayGrid(
        _app(federation, own_code()),
        len(sizes),
        experiment.ray,
        sizes=sizes,
        timeout_s=faults.timeout_s,
        node_timeout_s=faults.node_timeout_s,
    )


def _workers(federation: Federation) -> LocalGrid:
    experiment, sizes = federation.experiment, federation.sizes
    _check_client(federation)
    limit = experiment.faults.timeout_s
    return WorkersGrid(_app(federation), len(sizes), experiment.workers, sizes=sizes, timeout_s=limit)


def _app(federation: Federation, version: str | None = None) -> Callable[[], ClientApp]:
    """What a worker process builds: the server's experiment, with the functions that only this program has.

    `version` is the hash of fl_sim's code where the process may be on another machine.
    """
    experiment = federation.experiment
    own = pack(path for key, path in parts_of(experiment) if not key.startswith("strategy"))
    return partial(make_client_app, experiment, federation.world, own, version)


def _check_client(federation: Federation) -> None:
    """Make the clients once in this process: wrong input is for this process to say, before others start."""
    for track in federation.tracks:
        client_of(track)


ENGINES: Mapping[str, Callable[[Federation], LocalGrid]] = {
    "inline": _inline,
    "workers": _workers,
    "cohort": _cohort,
    "ray": _ray,
}


def settled(experiment: Experiment) -> tuple[Experiment, str | None]:
    """The experiment with its engine named, and why that one; None where the config names it already.

    Ray where `ray.address` asks for a cluster. Inline on a GPU (one process feeds it best), on one core, for small cohorts,
    and where the system cannot fork. Else workers.
    """
    if experiment.engine != "auto":
        return experiment, None
    engine, why = _choice(experiment)
    return experiment.model_copy(update={"engine": engine}), f"engine: {engine} ({why})"


def _choice(experiment: Experiment) -> tuple[Engine, str]:
    count, size, device = experiment.workers.count or cores(), experiment.cohort.size, experiment.device
    if experiment.ray.address is not None:
        return "ray", "ray.address is set"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return "inline", "one process feeds the GPU"
    if count < 2:
        return "inline", "one core"
    if size < FEW:
        return "inline", f"{size} clients a round, fewer than {FEW}"
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "inline", "this system cannot fork"
    return "workers", f"{count} processes, {size} clients a round"
