"""Apps in the shape of public Flower apps: results and ledger, on every engine; process state stays with its client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import numpy as np
import one_ray
import pytest
import torch
from flower_apps import (
    CLIENTS,
    analytics,
    leaving,
    process_state,
    secure,
    secure_server,
    sending,
    trees,
    vertical,
    vertical_server,
)
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl_sim import UserError
from fl_sim.communication.flower_private import simulate
from fl_sim.runtime.flower_run import AppRun, run_apps

ENGINES = ["inline", "workers", pytest.param("ray", marks=pytest.mark.slow)]
EMPTY = RecordDict({"config": ConfigRecord({})})


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    yield
    one_ray.end()


def run(server: ServerApp, client: ClientApp, engine: str, **options: object) -> AppRun:
    one_ray.start(engine)
    return run_apps(server, client, num_clients=CLIENTS, engine=engine, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_client_leaves_in_the_process_reaches_no_other_one(engine: str) -> None:
    found: list[list[Message]] = []
    before = process_state()
    run(sending("train", lambda *_: EMPTY, found), leaving, engine)
    assert process_state() == before
    told = [reply.content["told"] for replies in found for reply in replies if reply.has_content()]
    assert len(told) == 2 * (CLIENTS - 1)
    assert {tuple(t["state"][:2]) for t in told} == {("True", "torch.float32")}
    assert {t["state"][3] for t in told} == {""}
    assert len({t["state"][2] for t in told}) == 1
    assert told[0]["state"][2] != "/"
    for place in range(3):
        assert len({t["draws"][place] for t in told}) == len(told)


@pytest.mark.parametrize("engine", ENGINES)
def test_draws_depend_on_seed_partition_and_message_alone(engine: str) -> None:
    def draws(engine: str, seed: int) -> list[list[float]]:
        found: list[list[Message]] = []
        run(sending("train", lambda *_: EMPTY, found), leaving, engine, seed=seed)
        return [list(r.content["told"]["draws"]) for replies in found for r in replies if r.has_content()]

    assert draws(engine, 3) == draws("inline", 3) != draws("inline", 4)


def test_the_servers_process_is_as_before_whatever_it_does() -> None:
    app = ServerApp()

    @app.main()
    def main(grid: object, context: object) -> None:
        torch.set_grad_enabled(False)
        os.chdir("/")

    before = process_state()
    run(app, analytics, "inline")
    assert process_state() == before


@pytest.mark.parametrize("engine", ENGINES)
def test_trees_as_bytes(engine: str) -> None:
    found: list[list[Message]] = []
    model = RecordDict({"model": ArrayRecord([np.frombuffer(b"base", dtype=np.uint8)])})
    ran = run(sending("train", lambda *_: model, found, rounds=1), trees, engine)
    grown = [reply.content["model"]["0"].numpy().tobytes() for reply in found[0]]
    assert grown == [b"base" + bytes([p]) * 100 for p in range(CLIENTS)]
    weighed = sum(len(reply.content["model"]["0"].data) for reply in found[0])
    assert ran.ledger.total(by=("section",), where={"direction": "up"})["dense",] == weighed


@pytest.mark.parametrize("engine", ENGINES)
def test_analytics_queries_are_booked_as_metrics(engine: str) -> None:
    found: list[list[Message]] = []
    ran = run(sending("query", lambda *_: EMPTY, found), analytics, engine)
    counts = [list(reply.content["query_results"]["counts"]) for reply in found[0]]
    expected = [np.bincount(np.random.default_rng(p).integers(0, 5, 100), minlength=5).tolist() for p in range(CLIENTS)]
    assert counts == expected
    sizes = ran.ledger.total(by=("round", "direction", "section"), where={"phase": "query"})
    assert sizes[1, "up", "metrics"] == sizes[2, "up", "metrics"] > CLIENTS * 5
    assert sizes[1, "up", "dense"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_vertical_training_takes_steps_in_messages_that_nobody_waits_for(engine: str) -> None:
    found: list[list[list[float]]] = []
    ran = run(vertical_server(found), vertical, engine)
    # A node runs its messages in order: each embedding is made after the gradients that were pushed before it.
    assert [rows[0][2] for rows in found] == pytest.approx([2.0, 1.6, 1.2])
    assert {p: round(float(s["own"]["weight"]), 6) for p, s in ran.client_states.items()} == dict.fromkeys(
        range(4), 0.4
    )
    assert ran.ledger.messages(phase="train") == {"down": 3 * CLIENTS, "up": 3 * CLIENTS}


@pytest.mark.parametrize("engine", ENGINES)
def test_secure_aggregation_shows_its_keys_and_masked_vectors(engine: str) -> None:
    found: list[list[int]] = []
    ran = run(secure_server(found), secure, engine)
    assert found == [[sum(range(1, CLIENTS + 1))] * 1000]
    up = ran.ledger.total(by=("round", "section"), where={"direction": "up"})
    assert up[1, "dense"] == 0
    assert CLIENTS * (32 + 8000) < up[1, "config"] < CLIENTS * (32 + 8000 + 50)
    down = ran.ledger.total(by=("section",), where={"direction": "down"})
    assert CLIENTS * CLIENTS * 32 < down["config",] < CLIENTS * (CLIENTS * 32 + 60)


def test_ledgers_are_equal_row_by_row_on_every_engine() -> None:
    tables = []
    for engine in ("inline", "workers"):
        found: list[object] = []
        ran = run(secure_server(found), secure, engine)
        table = ran.ledger.to_table().to_pylist()
        tables.append(table)
    assert tables[0] == tables[1]


def test_node_config_is_by_partition_or_the_same() -> None:
    app = ClientApp()

    @app.query()
    def tell(message: Message, context: object) -> Message:
        return Message(RecordDict({"c": ConfigRecord(dict(context.node_config))}), reply_to=message)

    for given, expected in (
        ({"data": "x"}, ["x"] * CLIENTS),
        (lambda p: {"data": f"d{p}"}, [f"d{p}" for p in range(CLIENTS)]),
    ):
        found: list[list[Message]] = []
        run(sending("query", lambda *_: EMPTY, found, rounds=1), app, "inline", node_config=given)
        assert [reply.content["c"]["data"] for reply in found[0]] == expected
        assert [reply.content["c"]["partition-id"] for reply in found[0]] == list(range(CLIENTS))


@pytest.mark.parametrize("engine", ["workers", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_client_that_ends_its_process_is_an_error_reply_and_the_next_one_runs(engine: str) -> None:
    app = ClientApp()

    @app.train()
    def die(message: Message, context: object) -> Message:
        if context.node_config["partition-id"] == 1:
            os._exit(0)
        return Message(RecordDict({"c": ConfigRecord({"ok": True})}), reply_to=message)

    found: list[list[Message]] = []
    ran = run(sending("train", lambda *_: EMPTY, found), app, engine)
    assert [[reply.has_error() for reply in replies] for replies in found] == [[False, True, False, False]] * 2
    assert all("client 1: its worker process died" in reason for reason in ran.failures)


def test_an_error_of_the_server_is_the_callers_and_leaves_no_process() -> None:
    app = ServerApp()

    @app.main()
    def main(grid: object, context: object) -> None:
        raise LookupError("by design")

    before = children()
    for engine in ("inline", "workers"):
        with pytest.raises(LookupError, match="by design"):
            run(app, analytics, engine)
    assert children() == before


def children() -> set[str]:
    """Processes that this one has started."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_what_cannot_be_sent_to_another_process_is_an_error_reply() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.helper = lambda: None
        return Message(RecordDict(), reply_to=message)

    found: list[list[Message]] = []
    run(sending("train", lambda *_: EMPTY, found, rounds=1), app, "workers")
    assert all("client" in r.error.reason and "cannot be sent" in r.error.reason for r in found[0])


@pytest.mark.slow
def test_an_app_that_cannot_travel_to_ray_is_one_line() -> None:
    app, lock = ClientApp(), Lock()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with lock:
            return Message(RecordDict(), reply_to=message)

    with pytest.raises(UserError, match="the ClientApp cannot be pickled"):
        run(sending("train", lambda *_: EMPTY, []), app, "ray")


def test_one_run_at_a_time() -> None:
    """Flower keeps the identity of a run for the whole process."""
    app = ServerApp()

    @app.main()
    def main(grid: object, context: object) -> None:
        run(app, analytics, "inline")

    with pytest.raises(UserError, match="one at a time"):
        run(app, analytics, "inline")
    run(sending("query", lambda *_: EMPTY, []), analytics, "inline")


def test_ids_of_runs_differ_and_are_what_both_sides_see() -> None:
    seen: list[int] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        seen.extend((context.run_id, grid.run.run_id))

    ids = {run(app, analytics, "inline").run_id for _ in range(3)}
    assert len(ids) == 3
    assert set(seen) == ids


@pytest.mark.parametrize(("wrong", "match"), [(None, "NoneType, not a Message"), ("own", "no reply to its task")])
def test_an_answer_that_is_no_reply_is_an_error_at_once(wrong: str | None, match: str) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message | None:
        return message if wrong else None

    found: list[list[Message]] = []
    run(sending("train", lambda *_: EMPTY, found, rounds=1), app, "inline")
    assert all(match in reply.error.reason for reply in found[0])


def said(found: list[object]) -> list[object]:
    """What a ServerApp found, whatever the order of the nodes: their numbers are random on Flower."""
    return [
        sorted(
            repr({k: dict(v) for k, v in reply.content.items() if not isinstance(v, ArrayRecord)})
            + repr([a.data for r in reply.content.array_records.values() for a in r.values()])
            for reply in one
        )
        if isinstance(one, list) and isinstance(one[0], Message)
        else one
        for one in found
    ]


MODEL = RecordDict({"model": ArrayRecord([np.frombuffer(b"base", dtype=np.uint8)])})
SHAPES = {
    "trees": (lambda found: sending("train", lambda *_: MODEL, found), trees),
    "analytics": (lambda found: sending("query", lambda *_: EMPTY, found), analytics),
    "secure": (secure_server, secure),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_flowers_own_simulation_gives_the_same(shape: str) -> None:
    server, client = SHAPES[shape]
    ours: list[object] = []
    flowers: list[object] = []
    run(server(ours), client, "inline")
    simulate(server(flowers), client, nodes=CLIENTS, workers=2)
    assert said(ours) == said(flowers)
    assert len(ours) > 0
