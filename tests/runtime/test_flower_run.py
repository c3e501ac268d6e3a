"""Flower apps as their users have them, on our engines and ledger; Flower's own strategies on our Grid."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

from fl_sim import UserError
from fl_sim.communication.flower_private import CLIENT_APP_CRASHED, CLIENT_APP_RAISED
from fl_sim.communication.ledger import Ledger
from fl_sim.runtime.flower_run import run_apps
from fl_sim.runtime.grids.base import FIRST_NODE

NODES, ROUNDS, SIZE = 6, 2, 1000


def client_app(**options: object) -> ClientApp:
    """What Flower's users write: dense arrays both ways, state in the context, settings from the run config."""
    app = ClientApp(**options)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = message.content["arrays"].to_numpy_ndarrays()
        seen = context.state["seen"]["rounds"] + 1 if "seen" in context.state else 1
        context.state["seen"] = ConfigRecord({"rounds": seen})
        moved = [w + context.run_config["step"] * (1 + context.node_config["partition-id"]) for w in weights]
        metrics = MetricRecord({"num-examples": 10, "train_loss": 1.0, "seen": seen})
        return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        record = MetricRecord({"num-examples": 10, "eval_loss": 0.5})
        return Message(RecordDict({"metrics": record}), reply_to=message)

    return app


def server_app(strategy: Strategy, found: dict[str, object]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord([np.zeros(SIZE, dtype=np.float32)])
        found["result"] = strategy.start(grid=grid, initial_arrays=start, num_rounds=ROUNDS, timeout=60)

    return app


def run(
    strategy: Strategy, *, engine: str = "inline", app: ClientApp | None = None
) -> tuple[Ledger, dict[str, object]]:
    found: dict[str, object] = {}
    ran = run_apps(
        server_app(strategy, found), app or client_app(), num_clients=NODES, engine=engine, run_config={"step": 0.1}
    )
    assert ran.result is found["result"]
    return ran.ledger, found


def serialised() -> int:
    """Bytes of one model as Flower serialises it, counted apart from the code under test."""
    return len(next(iter(ArrayRecord([np.zeros(SIZE, dtype=np.float32)]).values())).data)


def test_an_existing_app_runs_and_every_array_is_booked() -> None:
    ledger, found = run(FedAvg())
    weights = found["result"].arrays.to_numpy_ndarrays()
    assert np.allclose(weights[0], ROUNDS * 0.1 * np.mean(np.arange(1, NODES + 1)), atol=1e-6)
    one = serialised()
    assert one > 4 * SIZE
    sizes = ledger.total(by=("direction", "phase", "section"))
    scalars = {key: size for key, size in sizes.items() if key[2] in ("config", "metrics")}
    assert {key: size for key, size in sizes.items() if key not in scalars} == {
        ("down", "train", "dense"): ROUNDS * NODES * one,
        ("down", "train", "header"): 0,
        ("down", "evaluate", "dense"): ROUNDS * NODES * one,
        ("down", "evaluate", "header"): 0,
        ("up", "train", "dense"): ROUNDS * NODES * one,
        ("up", "train", "header"): 0,
        ("up", "evaluate", "dense"): 0,
        ("up", "evaluate", "header"): 0,
    }
    assert scalars.keys() == {
        *(("down", phase, "config") for phase in ("train", "evaluate")),
        *(("up", phase, "metrics") for phase in ("train", "evaluate")),
    }
    assert set(ledger.column("round").tolist()) == {1, 2}
    assert set(ledger.column("client").tolist()) == set(range(NODES))


def test_state_survives_between_rounds() -> None:
    _, found = run(FedAvg(fraction_evaluate=0.0))
    seen = [found["result"].train_metrics_clientapp[number]["seen"] for number in (1, 2)]
    assert seen == pytest.approx([1, 2])


def test_a_client_that_raises_books_its_downlink_alone() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0:
            raise ValueError("by design")
        return client_app()(message, context)

    ledger, _ = run(FedAvg(fraction_evaluate=0.0), app=app)
    by = ledger.total(by=("direction", "client"), where={"section": "dense"})
    assert by["down", 0] == ROUNDS * serialised()
    assert ("up", 0) not in by
    assert by["up", 1] == ROUNDS * serialised()


def wrapped(kind: type[Strategy], **options: object) -> Strategy:
    """A differential-privacy wrapper around FedAvg."""
    inner = FedAvg(fraction_evaluate=0.0)
    return kind(inner, noise_multiplier=0.1, num_sampled_clients=NODES, **options)


STRATEGIES = {
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0),
    "FedAdagrad": lambda: FedAdagrad(fraction_evaluate=0.0),
    "FedYogi": lambda: FedYogi(fraction_evaluate=0.0),
    "FedAvgM": lambda: FedAvgM(fraction_evaluate=0.0, server_momentum=0.9),
    "FedProx": lambda: FedProx(fraction_evaluate=0.0, proximal_mu=0.1),
    "FedMedian": lambda: FedMedian(fraction_evaluate=0.0),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(fraction_evaluate=0.0, beta=0.2),
    "Krum": lambda: Krum(fraction_evaluate=0.0, num_malicious_nodes=1),
    "MultiKrum": lambda: MultiKrum(fraction_evaluate=0.0, num_malicious_nodes=1, num_nodes_to_select=3),
    "QFedAvg": lambda: QFedAvg(fraction_evaluate=0.0, client_learning_rate=0.1),
    "DP server, fixed": lambda: wrapped(DifferentialPrivacyServerSideFixedClipping, clipping_norm=1.0),
    "DP server, adaptive": lambda: wrapped(DifferentialPrivacyServerSideAdaptiveClipping, initial_clipping_norm=1.0),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_flowers_own_strategies_run_and_are_booked(name: str) -> None:
    moved = {"down": 0, "up": 0}

    def weigh(message: Message, context: Context, call: Callable[[Message, Context], Message]) -> Message:
        reply = call(message, context)
        for direction, passed in (("down", message), ("up", reply)):
            moved[direction] += sum(len(a.data) for r in passed.content.array_records.values() for a in r.values())
        return reply

    ledger, found = run(STRATEGIES[name](), app=client_app(mods=[weigh]))
    weights = found["result"].arrays.to_numpy_ndarrays()[0]
    assert weights.shape == (SIZE,)
    assert np.isfinite(weights).all()
    assert np.any(weights != 0)
    # Some of them answer in float64: what moves is weighed, not computed.
    assert moved["up"] >= ROUNDS * NODES * serialised()
    dense = ledger.total(by=("direction",), where={"section": "dense"})
    assert {direction: size for (direction,), size in dense.items()} == moved


def test_krum_chooses_one_clients_update() -> None:
    _, found = run(Krum(fraction_evaluate=0.0, num_malicious_nodes=1))
    step = found["result"].arrays.to_numpy_ndarrays()[0][0] / 0.1
    assert step == pytest.approx(round(step), abs=1e-4)


def test_client_side_differential_privacy_with_its_mod() -> None:
    strategy = wrapped(DifferentialPrivacyClientSideFixedClipping, clipping_norm=1.0)
    _, found = run(strategy, app=client_app(mods=[fixedclipping_mod]))
    weights = found["result"].arrays.to_numpy_ndarrays()[0]
    # Without clipping a round moves the model by 0.35 * sqrt(1000) = 11.1.
    assert np.linalg.norm(weights) < ROUNDS * 3


def test_an_unknown_engine_is_the_users_error() -> None:
    with pytest.raises(UserError, match="inline, workers, ray"):
        run(FedAvg(), engine="rya")


@pytest.mark.parametrize("engine", ["inline", "workers"])
def test_garbage_collections_of_a_client_pass_over_what_was_there_before(engine: str) -> None:
    app, found = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"c": ConfigRecord({"seen": len(gc.get_objects())})}), reply_to=message)

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        (reply,) = grid.send_and_receive([Message(RecordDict(), 1000, "train")])
        found.append(reply.content["c"]["seen"])

    gc.unfreeze()
    try:
        run_apps(server, app, num_clients=1, engine=engine)
        assert gc.get_freeze_count() == 0
        assert found[0] < len(gc.get_objects()) / 10
    finally:
        gc.freeze()  # as the test session had it


@pytest.mark.slow
def test_ray_books_the_same() -> None:
    inline, first = run(FedAvg())
    ray, second = run(FedAvg(), engine="ray")
    by = ("round", "direction", "phase", "client")
    assert ray.total(by=by) == inline.total(by=by)
    # Flower draws its nodes in an order of its own, and folds float32 sums in it.
    assert np.allclose(*(found["result"].arrays.to_numpy_ndarrays()[0] for found in (first, second)), rtol=1e-5)


@pytest.mark.parametrize("engine", ["inline", "workers"])
@pytest.mark.parametrize("entry", ["state", "node_config"])
def test_a_client_that_spoils_its_context_is_named_and_the_next_call_finds_what_was_there(
    engine: str, entry: str
) -> None:
    client, server, codes = ClientApp(), ServerApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        setattr(context, entry, None)
        message.metadata.dst_node_id = 5
        raise ValueError("by design")

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        setattr(context, entry, None)
        return Message(RecordDict(), reply_to=message)

    @client.query()
    def query(message: Message, context: Context) -> Message:
        assert context.state == RecordDict()
        return Message(RecordDict({"c": ConfigRecord(dict(context.node_config))}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for kind in ("train", "evaluate", "query"):
            (reply,) = grid.send_and_receive([Message(RecordDict(), FIRST_NODE + 1, kind)])
            codes.append(reply.error.code if reply.has_error() else reply.content["c"]["partition-id"])

    ran = run_apps(server, client, num_clients=2, engine=engine)
    assert codes == [CLIENT_APP_RAISED, CLIENT_APP_CRASHED, 1]
    raised, spoilt = ran.failures
    assert raised.startswith("client 1: ValueError: by design")
    assert spoilt == "client 1: a client must leave a RecordDict in context.state and a dict in context.node_config"
