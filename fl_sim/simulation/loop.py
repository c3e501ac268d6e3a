"""The composition root: an `Experiment` becomes a federation, runs, and leaves a run folder and a `Report`.

>>> from fl_sim import Experiment, run
>>> report = run(Experiment.load("configs/quickstart.toml"))
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import Context, RecordDict

from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.core.observer import SILENT, Observer
from fl_sim.core.types import UserError
from fl_sim.report import Report
from fl_sim.runtime.client.host import client_app
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.grids.cohort import CohortGrid
from fl_sim.runtime.grids.inline import InlineGrid
from fl_sim.runtime.grids.ray import RayGrid
from fl_sim.runtime.grids.workers import WorkersGrid
from fl_sim.simulation.checkpoint_store import Checkpoints
from fl_sim.simulation.engines import settled
from fl_sim.simulation.federation import Federation, make_client_app, resolved
from fl_sim.simulation.parts import check, check_built
from fl_sim.simulation.run_folder import CHECKPOINTS, claimed, clear, scratch
from fl_sim.simulation.server import Session, saved_params
from fl_sim.training.precision import PRECISIONS


@contextmanager
def open_grid(experiment: Experiment, federation: Federation) -> Iterator[LocalGrid]:
    """The engine of an experiment, closed at the end."""
    experiment, _ = settled(experiment)
    factory = ENGINES.get(experiment.engine)
    if factory is None:
        raise UserError(
            f"engine = {experiment.engine!r} is started by Flower: flwr run examples/flower; here: {', '.join(ENGINES)}"
        )
    with closing(factory(experiment, federation)) as grid:
        yield grid


def _inline(experiment: Experiment, federation: Federation) -> LocalGrid:
    return InlineGrid(client_app(federation.hosts()), len(federation.parts), timeout_s=experiment.faults.timeout_s)


def _cohort(experiment: Experiment, federation: Federation) -> LocalGrid:
    if experiment.faults.timeout_s is not None:
        raise UserError("faults.timeout_s: clients that train together have no time of their own; use another engine")
    hosts = federation.hosts()
    return CohortGrid(client_app(hosts), hosts, len(federation.parts), chunk=experiment.cohort.chunk)


def _ray(experiment: Experiment, federation: Federation) -> LocalGrid:
    federation.client()  # wrong input is for this process to say, before others start
    sizes, limit = federation.sizes, experiment.faults.timeout_s
    return RayGrid(partial(make_client_app, experiment), len(sizes), experiment.ray, sizes=sizes, timeout_s=limit)


def _workers(experiment: Experiment, federation: Federation) -> LocalGrid:
    federation.client()  # as above
    sizes, limit = federation.sizes, experiment.faults.timeout_s
    app = partial(make_client_app, experiment)
    return WorkersGrid(app, len(sizes), experiment.workers, sizes=sizes, timeout_s=limit)


ENGINES: Mapping[str, Callable[[Experiment, Federation], LocalGrid]] = {
    "inline": _inline,
    "workers": _workers,
    "cohort": _cohort,
    "ray": _ray,
}


def run(experiment: Experiment, observer: Observer = SILENT) -> Report:
    """Run an experiment on its engine; writes `<out>/<name>-<id>/` and returns the same as a value.

    Raises:
        UserError: the experiment asks for something impossible, or another run holds the folder.
        RunStopped: too few usable updates in a round, or a folder that cannot be written.
    """
    experiment, _ = settled(experiment)
    check(experiment)
    with claimed(experiment) as folder, scratch(folder) as rows:
        federation = Federation.build(experiment)
        check_built(federation)
        federation = replace(federation, experiment=resolved(experiment, federation))
        session = Session(experiment, federation, folder, Ledger(rows), observer)
        with _engine(federation) as grid:
            clear(folder)  # an engine that does not start leaves the earlier results
            _serve(session, grid)
        return session.finish()


def resume(experiment: Experiment, observer: Observer = SILENT) -> Report:
    """Finish a run that was killed or stopped, with the results of one that never was; read one that is finished.

    Raises:
        UserError: as `run`, or checkpoints that cannot be read.
        RunStopped: as `run`.
    """
    experiment, _ = settled(experiment)
    check(experiment)
    with claimed(experiment) as folder, scratch(folder) as rows:
        if (folder / "summary.json").exists():
            return replace(Report.load(folder), params=saved_params(folder))
        federation = Federation.build(experiment)
        check_built(federation)
        federation = replace(federation, experiment=_as_before(experiment, federation, folder))
        session = Session(experiment, federation, folder, Ledger(rows), observer)
        with _engine(federation) as grid:
            session.restore(grid)
            _serve(session, grid)
        return session.finish()


def _as_before(experiment: Experiment, federation: Federation, folder: Path) -> Experiment:
    """Settle what depends on the machine as the stopped run did, which may have chosen otherwise than a probe now."""
    for manifest in Checkpoints(folder / CHECKPOINTS).manifests():
        if manifest.precision in PRECISIONS:
            training = replace(experiment.training, precision=manifest.precision)
            return experiment.model_copy(update={"training": training})
    return resolved(experiment, federation)


@contextmanager
def _engine(federation: Federation) -> Iterator[LocalGrid]:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with open_grid(federation.experiment, federation) as grid:
        yield grid


def _serve(session: Session, grid: LocalGrid) -> None:
    session.server_app()(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
