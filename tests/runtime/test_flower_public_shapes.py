"""Apps in the shape of public Flower apps give what they give in Flower's own simulation: pinned here, asked there when slow."""

from __future__ import annotations

from collections.abc import Iterator

import one_ray
import pytest
from flower_apps import CLIENTS
from flower_loop_apps import LOOPS
from flower_strategy_apps import SERVERS

from fl_sim.communication.flower_private import simulate
from fl_sim.runtime.flower_run import run_apps

APPS = {**SERVERS, **LOOPS}
ADDED = [(1, 0), (1, 1), (1, 2), (1, 3)]
WEIGHED = [(1, 0), (2, 1), (3, 2), (4, 3)]
RAW = [(2, -1)] * 4
PINNED: dict[str, list[object]] = {
    "plain": [
        [[6.375] * 3, [[6.375] * 2] * 2],
        {number: {"loss": 1.0625} for number in (1, 2, 3)},
        {1: {"mean": 3.625}, 2: {"mean": 5.75}, 3: {"mean": 7.875}},
        {},
    ],
    "linear model": [
        [[[29.872559, -30.008598, 4.065659, 0.274001]], [-2.251277]],
        {1: {"accuracy": 0.86875}, 2: {"accuracy": 0.925}, 3: {"accuracy": 0.94375}},
        {},
        {},
    ],
    "boosted trees": [[(after, leaf) for after in (0, 4, 8) for leaf in range(4)], ["12", list(range(12))]],
    "clipped by the server": [[[1.5] * 4], {1: {}, 2: {}, 3: {}}, {}, {}],
    "clipped by the client": [[[1.5] * 4], {1: {}, 2: {}, 3: {}}, {}, {}],
    "mods": [[[3.0, 3.0]], {1: {"calls": 1.0}, 2: {"calls": 2.0}, 3: {"calls": 3.0}}, {}, {}],
    "residual": [
        [[0.0, 0.0, 10.0, 22.5]],
        {1: {"residual": 7.5}, 2: {"residual": 12.5}, 3: {"residual": 12.5}},
        {},
        {},
    ],
    "evaluation alone": [[], {}, {1: {"mean": 3.0}, 2: {"mean": 3.0}}, {}],
    "lifespan": ["up", [[0.0]], {n: {"ended": n - 1.0, "open": 1.0} for n in (1, 2, 3)}, {}, {}, "down"],
    "own strategy": [
        (1, 4, 0),
        (2, 4, 1),
        (3, 4, 0),
        [[-1.75, -1.75]],
        {1: {"lr": 1.0}, 2: {"lr": 0.5}, 3: {"lr": 0.25}},
        {},
        {0: {"norm": 0.0}, 1: {"norm": 2.0}, 2: {"norm": 3.0}, 3: {"norm": 3.5}},
    ],
    "PyTorch": [
        [
            [[1.0] * 3] * 2,
            [1.0] * 2,
            [0.664226] * 2,
            [0.664225] * 2,
            [2.289625] * 2,
            [3.533774] * 2,
            5.0,
        ],
        {1: {"loss": 1.629997}, 2: {"loss": 1.082686}},
        {},
        {},
    ],
    "FedAdam": [
        [[1.248926] * 3],
        {number: {"loss": 1.0625} for number in (1, 2, 3)},
        {},
        {},
    ],
    "survival": [[(1, 0.95), (3, 0.782353), (5, 0.469412), (7, 0.156471)]],
    "actions": [[10.0, 10.0], [100.0, 100.0], [[1, 0]] * 4],
    "asynchronous": [[(own, number) for own in range(4) for number in (1, 2, 3)]],
    "capacities": [[[3.0, 5.0], [3.0, 5.0]]],
    "NumPyClient": [(0, [0.0, 0.0]), ADDED, (1, [0.75, 0.75]), WEIGHED, ADDED, (2, [2.25, 2.25]), WEIGHED],
    "Client": [(0, [0.0, 0.0]), RAW, (1, [0.37123, 0.37123]), RAW, RAW, (2, [0.799496, 0.799496]), RAW],
    "own server": [[(1, 6.0), (2, 15.0), (3, 27.0)], [[9.0, 9.0]]],
}
"""App -> what its ServerApp finds, in plain numbers."""
QUICK = ("residual", "asynchronous", "NumPyClient")
"""Those that also run in processes each time; the others do in the slow tests."""


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    yield
    one_ray.end()


def found(name: str, engine: str) -> list[object]:
    one_ray.start(engine)
    server, client = APPS[name]
    values: list[object] = []
    run_apps(server(values), client, num_clients=CLIENTS, engine=engine, seed=0)
    return values


def close(value: object, wanted: object) -> bool:
    """Whether two nested values agree, floats to a millionth: sums of float32 depend on the order of the replies."""
    if isinstance(wanted, dict):
        return (
            isinstance(value, dict)
            and value.keys() == wanted.keys()
            and all(close(value[k], wanted[k]) for k in wanted)
        )
    if isinstance(wanted, (list, tuple)):
        return len(value) == len(wanted) and all(map(close, value, wanted))
    return value == (pytest.approx(wanted, abs=3e-6) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize("name", APPS)
def test_in_this_process(name: str) -> None:
    values = found(name, "inline")
    assert close(values, PINNED[name]), values


@pytest.mark.parametrize(
    ("engine", "name"),
    [("workers", n) if n in QUICK else pytest.param("workers", n, marks=pytest.mark.slow) for n in APPS]
    + [pytest.param("ray", name, marks=pytest.mark.slow) for name in APPS],
)
def test_in_other_processes(engine: str, name: str) -> None:
    assert found(name, engine) == found(name, "inline")


@pytest.mark.slow
@pytest.mark.parametrize("name", APPS)
def test_in_flowers_own_simulation(name: str) -> None:
    one_ray.end()
    server, client = APPS[name]
    values: list[object] = []
    simulate(server(values), client, nodes=CLIENTS, workers=2)
    assert close(values, PINNED[name]), values


def test_a_pinned_value_that_is_off_would_be_seen() -> None:
    assert not close([[[1.5] * 4], {1: {}}], [[[1.5] * 3 + [1.50001]], {1: {}}])
    assert not close({1: {"a": 1.0}}, {1: {"b": 1.0}})
