"""The engines by name: which Grid carries a federation's messages, and which one `engine = "auto"` means."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

import torch
from flwr.clientapp import ClientApp

from fl_sim.config.experiment import Engine, Experiment
from fl_sim.core.types import UserError
from fl_sim.data import Split
from fl_sim.models.macs import count_macs
from fl_sim.runtime.by_value import pack
from fl_sim.runtime.client.host import client_app
from fl_sim.runtime.grids.allocator import keep_freed_memory
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.grids.cohort import CohortGrid, Stackable, obstacle_of
from fl_sim.runtime.grids.inline import InlineGrid
from fl_sim.runtime.grids.ray import RayGrid
from fl_sim.runtime.grids.workers import WorkersGrid, cores
from fl_sim.simulation.client_side import client_of, hosts_of, make_client_app
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.identity import parts_of
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.simulation.user_code import own_code
from fl_sim.sparsity.curves import calibration
from fl_sim.training.batchable import failure

FEW = 4
"""A smaller cohort is over before further processes have paid for their start."""
MOST_PARAMETERS, MOST_MACS, LEAST_CLIENTS = 10_000, 1_000_000, 32
"""Parameters that train, multiply-accumulates of the forward passes of a step, and clients of a round: within all three, clients
that train as one batch were 4.9 to 13 times as fast as one after the other on a CPU (docs/performance.md). A rule, not a
measurement: two runs of a config take the same engine, whose last bits differ from the others'."""


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
    experiment = federation.experiment
    hosts = hosts_of(federation)
    grid = InlineGrid(client_app(hosts), len(federation.partitions), timeout_s=experiment.faults.timeout_s)
    largest = max(track.exchange.schema.nbytes for track in federation.tracks)
    keep_freed_memory((experiment.schedule.concurrency or experiment.cohort.size) * largest)
    return grid


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
    """The experiment with its engine named, and why that one; None where the config names it already. Once the model is built,
    `settled_by_model` has the last word.

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


def settled_by_model(federation: Federation, why: str, *, before: str | None = None) -> tuple[Federation, str]:
    """The federation on the cohort engine where `engine = "auto"` and its models are tiny; else as it is, and `why`.

    The number of cores plays no part: a config gives the same numbers on every machine. A run that is resumed keeps to what
    it had `before`.
    """
    other = before is not None and before != "cohort"
    said = None if other else _tiny(federation, taken=before is not None)
    if said is None:
        return federation, why
    experiment = federation.experiment.model_copy(update={"engine": "cohort"})
    return replace(federation, experiment=experiment), f"engine: cohort ({said})"


def _tiny(federation: Federation, *, taken: bool) -> str | None:
    """What makes a federation one whose clients train fastest together, or that its stopped run did; None where they do not."""
    experiment = federation.experiment
    if experiment.ray.address is not None or federation.first.device.type != "cpu":
        return None
    if experiment.faults.timeout_s is not None or not experiment.schedule.in_rounds:
        return None
    data = federation.data.train.subset(federation.partitions[0])
    if any(obstacle_of(client_of(track), track.model, data) for track in federation.tracks):
        return None
    if taken:
        return "as the stopped run"
    sizes = [sum(p.numel() for p in track.model.parameters() if p.requires_grad) for track in federation.tracks]
    if max(sizes) > MOST_PARAMETERS or min(track.cohort_size for track in federation.tracks) < LEAST_CLIENTS:
        return None
    tokens, batch = data.stored.dtype == torch.int64, experiment.training.batch_size
    text = calibration(data, 1)[0] if tokens else None  # zeros are padding, which a model may skip
    macs = max(count_macs(track.model, tuple(data.shape), sample=text) for track in federation.tracks) * batch
    if macs > MOST_MACS or any(_fails(track, data) for track in federation.tracks):
        return None
    told = f"{max(sizes):,} parameters, {macs:,} multiply-accumulates a step, {experiment.cohort.size} clients a round"
    return f"{told}: they train as one batch, equal to inline up to rounding"


def _fails(track: ModelTrack, data: Split) -> bool:
    """Whether two clients that train together for a step do not come out as each alone."""
    client = client_of(track)
    assert isinstance(client, Stackable)
    training = client.plain_training()
    assert training is not None
    return failure(track.model, data, training.at(1), track.experiment.learning.criterion) is not None
