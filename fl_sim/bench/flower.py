"""Flower's own simulation of our apps: the same strategy and the same ClientApp, over its Grid and its Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_sim.bench.contest import Measured, alternate, rounds
from fl_sim.communication.flower_private import simulate
from fl_sim.config.experiment import Experiment
from fl_sim.runtime.client.host import ClientHost, client_app
from fl_sim.simulation.client_side import hosts_of
from fl_sim.simulation.federation import Federation


@lru_cache(maxsize=1)
def _hosts(experiment: str) -> Callable[[Context], ClientHost]:
    """The resident client side of a process, as JSON names it: Flower sends the app anew with every message."""
    return hosts_of(Federation.build(Experiment.model_validate_json(experiment)))


@dataclass(frozen=True)
class _Host:
    """Node -> its host; small enough to travel with every message."""

    experiment: str

    def __call__(self, context: Context) -> ClientHost:
        return _hosts(self.experiment)(context)


def beside(
    experiment: Experiment, others: Mapping[str, Callable[[], None]], *, repeats: int, workers: int = 2
) -> dict[str, Measured]:
    """Rounds of an experiment in Flower's simulation ("flower"), and what else takes turns with them."""
    federation, app, measured = Federation.build(experiment), ServerApp(), {}

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        measured.update(alternate({**others, "flower": rounds(federation, grid)}, repeats=repeats))

    clients = client_app(_Host(experiment.model_dump_json()))
    simulate(app, clients, nodes=experiment.data.clients, workers=workers)
    return measured
