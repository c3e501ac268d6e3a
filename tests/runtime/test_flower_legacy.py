"""Legacy Flower apps (NumPyClient, client_fn, ServerAppComponents) on every engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import one_ray
import pytest
from flower_legacy import CLIENTS, ROUNDS, client_app, server_app
from flwr.serverapp import ServerApp

from fl_sim import UserError
from fl_sim.runtime.flower_run import AppRun, run_apps

ENGINES = ["inline", "workers", pytest.param("ray", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    yield
    one_ray.end()


def run(
    engine: str = "inline", **config: object
) -> tuple[AppRun, list[tuple[list[tuple[int, int, float]], int, list[float]]]]:
    one_ray.start(engine)
    found: list[object] = []
    return run_apps(server_app(found, **config), client_app, num_clients=CLIENTS, engine=engine), found


@pytest.mark.parametrize("engine", ENGINES)
def test_every_client_trains_its_own_partition_and_keeps_its_state(engine: str) -> None:
    ran, found = run(engine, given=True)
    assert [[(p, t) for p, t, _ in seen] for seen, _, _ in found] == [
        [(p, number) for p in range(CLIENTS)] for number in range(1, ROUNDS + 1)
    ]
    mean = sum(p * (1 + p) for p in range(CLIENTS)) / sum(1 + p for p in range(CLIENTS))
    assert found[0][2] == [float(p) for p in range(CLIENTS)]
    assert np.allclose(found[1][2], [mean + p for p in range(CLIENTS)])
    losses = [loss for _, loss in ran.result.losses_distributed]
    assert np.allclose(losses, [mean * number for number in range(1, ROUNDS + 1)])
    assert {p: state["seen"]["times"] for p, state in ran.client_states.items()} == dict.fromkeys(
        range(CLIENTS), ROUNDS
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_draws_of_a_client_are_its_own_whatever_runs_beside_it(engine: str) -> None:
    _, found = run(engine, given=True)
    draws = [draw for seen, _, _ in found for _, _, draw in seen]
    assert len(set(draws)) == CLIENTS * ROUNDS
    _, again = run("inline", given=True)
    assert [seen for seen, _, _ in found] == [seen for seen, _, _ in again]


@pytest.mark.parametrize("engine", ENGINES)
def test_initial_parameters_come_from_a_client_and_are_booked(engine: str) -> None:
    ran, _ = run(engine)
    asked = ran.ledger.total(by=("direction", "section"), where={"phase": "get_parameters"})
    assert asked["up", "dense"] > 4 * 8
    assert asked["down", "config"] == 0  # a record without entries
    assert sum(ran.ledger.messages(phase="get_parameters").values()) == 2


def test_rounds_of_the_ledger_are_those_of_the_server() -> None:
    ran, _ = run(given=True)
    assert set(ran.ledger.column("round").tolist()) == set(range(1, ROUNDS + 1))


def test_a_client_that_raises_is_told_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    ran, found = run(given=True, broken=2)
    assert [failed for _, failed, _ in found] == [1] * ROUNDS
    (reason,) = ran.failures
    assert reason.startswith("client 2: ValueError: by design (flower_legacy.py, line ")
    assert ran.failures[reason] == ROUNDS
    assert reason in caplog.text
    assert "seen" not in ran.client_states.get(2, {}), "what it kept before it raised is discarded"


def test_what_is_no_app_is_refused_in_one_line() -> None:
    for server, client, number, match in (
        (lambda grid, context: None, client_app, 2, "server_app is a function"),
        (ServerApp(), "client:app", 2, "client_app is a str"),
        (ServerApp(), client_app, 0, "num_clients = 0"),
        (ServerApp(), client_app, 2.5, "num_clients = 2.5"),
    ):
        with pytest.raises(UserError, match=match):
            run_apps(server, client, num_clients=number)
