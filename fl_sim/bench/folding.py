"""Updates that workers add up, beside updates that come to the program one by one: bytes and seconds of a round.

Both take turns on the same workers. What comes back has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from fl_sim.bench.contest import Flat, alternate, opened, rounds, spread_of
from fl_sim.bench.workloads import no_op
from fl_sim.config.experiment import Experiment
from fl_sim.runtime.grids.folding import Traffic
from fl_sim.runtime.grids.pool import PooledGrid

CLIENTS = 256
"""Of a round; each echoes 466,906 parameters."""


def results(repeats: int) -> Flat:
    """Two workers of each engine."""
    flat: Flat = {}
    for engine in ("workers", "ray"):
        flat |= beside(engine, no_op(engine, cohort=CLIENTS), repeats=max(3, repeats // 3))
    return flat


def beside(name: str, experiment: Experiment, *, repeats: int) -> Flat:
    """A round each way, in turn: MB that come back, and milliseconds of a client."""
    with opened(experiment) as (federation, found):
        grid = cast(PooledGrid, found)
        limits = {"folded": grid.sums_bytes, "single": 0.0}
        one_round, clients = rounds(federation, grid), experiment.cohort.size

        def under(limit: float) -> Callable[[], None]:
            def once() -> None:
                grid.sums_bytes = limit
                one_round()

            return once

        measured = alternate({way: under(limit) for way, limit in limits.items()}, repeats=repeats)
        back = {way: _came_back(grid, under(limit)) for way, limit in limits.items()}
    flat: Flat = {f"fold_{name}_{way}_mb_a_round": size / 1e6 for way, size in back.items()}
    for way, each in measured.items():
        flat |= spread_of(f"fold_{name}_{way}_ms_per_client", [1e3 * s / clients for s in each.seconds])
    return flat


def _came_back(grid: PooledGrid, one_round: Callable[[], None]) -> int:
    """Bytes of the payloads and sums of a round."""
    grid.traffic = Traffic()
    one_round()
    return grid.traffic.sums_bytes + grid.traffic.payload_bytes
