"""Flower's Grid contract, row by row: the same ServerApp asks Flower's own simulation and each of our engines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import one_ray
import pytest
from flower_contract import FLOWERS, NODES, ROWS, client_app, server_app
from flower_contract_edges import EDGES, FLOWERS_EDGES

from fl_sim.communication.flower_private import simulate
from fl_sim.runtime.flower_run import run_apps

ENGINES = [
    "inline",
    "workers",
    pytest.param("ray", marks=pytest.mark.slow),
]
HERE = {**ROWS, **EDGES}
THERE = {**FLOWERS, **FLOWERS_EDGES}
NAMES = [row.__name__ for row in HERE]


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    yield
    one_ray.end()


@cache
def observed(engine: str) -> dict[str, object]:
    """One start for all rows."""
    one_ray.start(engine)
    found: dict[str, object] = {}
    run_apps(server_app(found, HERE), client_app, num_clients=NODES, engine=engine)
    return found


@cache
def flowers() -> dict[str, object]:
    one_ray.end()  # Flower's simulation takes a Ray that runs, whose workers do not find this folder's modules
    found: dict[str, object] = {}
    simulate(server_app(found, HERE), client_app, nodes=NODES, workers=2)
    return found


@pytest.mark.parametrize("row", HERE, ids=NAMES)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_contract(engine: str, row) -> None:
    assert observed(engine)[row.__name__] == HERE[row]


@pytest.mark.slow
@pytest.mark.parametrize("row", HERE, ids=NAMES)
def test_flower_itself(row) -> None:
    assert flowers()[row.__name__] in THERE.get(row, [HERE[row]])


def test_the_documents_have_every_row() -> None:
    table = Path("docs/flower_apps.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in table] == []
