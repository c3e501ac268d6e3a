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

from flwr.app import Context, RecordDict

from fl_sim.config import Experiment
from fl_sim.federation import Federation, make_client_app, resolved
from fl_sim.report import Report
from fl_sim.runtime.app import client_app
from fl_sim.runtime.inline import InlineGrid
from fl_sim.runtime.local import LocalGrid
from fl_sim.runtime.ray import RayGrid
from fl_sim.session import SILENT, Observer, Session
from fl_sim.types import UserError


@contextmanager
def open_grid(experiment: Experiment, federation: Federation) -> Iterator[LocalGrid]:
    """The engine of an experiment, closed at the end."""
    factory = ENGINES.get(experiment.engine)
    if factory is None:
        raise UserError(
            f"engine = {experiment.engine!r} is started by Flower: flwr run examples/flower; here: {', '.join(ENGINES)}"
        )
    with closing(factory(experiment, federation)) as grid:
        yield grid


def _inline(experiment: Experiment, federation: Federation) -> LocalGrid:
    host = federation.host()
    return InlineGrid(client_app(lambda context: host), len(federation.parts))


def _ray(experiment: Experiment, federation: Federation) -> LocalGrid:
    federation.client()  # wrong input is for this process to say, before others start
    return RayGrid(partial(make_client_app, experiment), len(federation.parts), experiment.ray)


ENGINES: Mapping[str, Callable[[Experiment, Federation], LocalGrid]] = {"inline": _inline, "ray": _ray}


def run(experiment: Experiment, observer: Observer = SILENT) -> Report:
    """Run an experiment on its engine; writes `<out>/<name>-<id>/` and returns the same as a value.

    Raises:
        UserError: the experiment asks for something impossible.
        RoundFailed: a round in which no client returned a usable update.
    """
    federation = Federation.build(experiment)
    settled = resolved(experiment, federation)
    federation = replace(federation, experiment=settled)
    session = Session(experiment, federation, observer)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with open_grid(settled, federation) as grid:
        session.server_app()(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    return session.finish()
