"""Flower apps that let a strategy run the rounds, each in the shape of a public one, written anew: (server, client) by name.

Values are small integers and halves, so that sums do not depend on the order of the replies.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from flower_apps import CLIENTS, answer
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod, message_size_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedProx,
    FedXgbBagging,
    Strategy,
)
from sklearn.linear_model import SGDClassifier

Found = list[object]
ALL = {"min_train_nodes": CLIENTS, "min_evaluate_nodes": CLIENTS, "min_available_nodes": CLIENTS}
ROUNDS = 3


def partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def numbers(record: ArrayRecord) -> list[object]:
    """The arrays as rounded lists."""
    return [np.round(array.astype(np.float64), 6).tolist() for array in record.to_numpy_ndarrays()]


def rounded(metrics: object) -> object:
    """Metrics by round as plain numbers."""
    return {n: {k: np.round(v, 6).tolist() for k, v in sorted(m.items())} for n, m in dict(metrics).items()}


def started(
    strategy: Callable[[Found], Strategy], arrays: ArrayRecord, found: Found, *, rounds: int = ROUNDS, **options: object
) -> ServerApp:
    """A ServerApp that starts a strategy; its result goes to `found` in plain numbers."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        result = strategy(found).start(grid=grid, initial_arrays=arrays, num_rounds=rounds, **options)
        found.append(numbers(result.arrays))
        for table in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
            found.append(rounded(getattr(result, table)))

    return app


def zeros(*shapes: int | tuple[int, ...]) -> ArrayRecord:
    return ArrayRecord([np.zeros(shape, np.float32) for shape in shapes])


# Plain FedAvg over NumPy arrays: every client adds its number, weighted by its number of samples.

plain = ClientApp()


@plain.train()
def add(message: Message, context: Context) -> Message:
    own = partition(context)
    arrays = [array + own for array in message.content["arrays"].to_numpy_ndarrays()]
    return answer(
        message, arrays=ArrayRecord(arrays), metrics=MetricRecord({"num-examples": 2 * own + 1, "loss": own / 2})
    )


@plain.evaluate()
def measure(message: Message, context: Context) -> Message:
    mean = float(message.content["arrays"].to_numpy_ndarrays()[0].mean())
    return answer(message, metrics=MetricRecord({"num-examples": 1, "mean": mean + partition(context)}))


def plain_server(found: Found) -> ServerApp:
    return started(lambda _: FedAvg(**ALL), zeros(3, (2, 2)), found)


# scikit-learn: a linear model's coefficients as arrays, partial_fit on what the client has.

linear = ClientApp()


def samples(own: int) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(own).normal(size=(40, 4))
    return draws, (draws[:, 0] > draws[:, 1]).astype(int)


@linear.train()
def fit(message: Message, context: Context) -> Message:
    coefficients, intercept = message.content["arrays"].to_numpy_ndarrays()
    x, y = samples(partition(context))
    model = SGDClassifier(random_state=partition(context), shuffle=False)
    model.partial_fit(x, y, classes=[0, 1])
    model.coef_, model.intercept_ = coefficients.astype(np.float64).copy(), intercept.astype(np.float64).copy()
    model.partial_fit(x, y)
    metrics = MetricRecord({"num-examples": len(x), "accuracy": float(model.score(x, y))})
    return answer(message, arrays=ArrayRecord([model.coef_, model.intercept_]), metrics=metrics)


def linear_server(found: Found) -> ServerApp:
    return started(lambda _: FedAvg(fraction_evaluate=0.0, **ALL), zeros((1, 4), 1), found)


# Boosted trees: JSON as bytes in one array, bagged by Flower's strategy.

boosted = ClientApp()


def forest(trees: list[dict[str, object]]) -> bytes:
    model = {
        "gbtree_model_param": {"num_trees": str(len(trees)), "num_parallel_tree": "1"},
        "iteration_indptr": list(range(len(trees) + 1)),
        "trees": trees,
        "tree_info": [0] * len(trees),
    }
    return json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()


@boosted.train()
def boost(message: Message, context: Context) -> Message:
    sent = message.content["arrays"]["0"].numpy().tobytes()
    before = len(json.loads(sent)["learner"]["gradient_booster"]["model"]["trees"]) if sent else 0
    tree = forest([{"id": 0, "leaf": partition(context), "after": before}])
    record = ArrayRecord([np.frombuffer(tree, np.uint8)])
    return answer(message, arrays=record, metrics=MetricRecord({"num-examples": 1}))


def boosted_server(found: Found) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedXgbBagging(fraction_evaluate=0.0, **ALL)
        result = strategy.start(grid, ArrayRecord([np.frombuffer(b"", np.uint8)]), num_rounds=ROUNDS)
        model = json.loads(result.arrays["0"].numpy().tobytes())["learner"]["gradient_booster"]["model"]
        found.append(sorted((tree["after"], tree["leaf"]) for tree in model["trees"]))
        found.append([model["gbtree_model_param"]["num_trees"], [tree["id"] for tree in model["trees"]]])

    return app


# Differential privacy, with noise of size 0 so that two runs compare: clipped by the server, and by the client's mod.

pushing = ClientApp()
clipping = ClientApp(mods=[fixedclipping_mod])


@pushing.train()
@clipping.train()
def push(message: Message, context: Context) -> Message:
    arrays = [array + 4.0 * (1 + partition(context)) for array in message.content["arrays"].to_numpy_ndarrays()]
    return answer(message, arrays=ArrayRecord(arrays), metrics=MetricRecord({"num-examples": 1}))


def clipped(wrapper: type[Strategy]) -> Callable[[Found], ServerApp]:
    def server(found: Found) -> ServerApp:
        options = {"noise_multiplier": 0.0, "clipping_norm": 1.0, "num_sampled_clients": CLIENTS}
        return started(lambda _: wrapper(FedAvg(fraction_evaluate=0.0, **ALL), **options), zeros(4), found)

    return server


# Mods: one that changes what the client is told, one that counts calls in the state, and Flower's message_size_mod.


def doubling(message: Message, context: Context, call: Callable[[Message, Context], Message]) -> Message:
    message.content["config"]["step"] = 2 * message.content["config"]["step"]
    return call(message, context)


def counting(message: Message, context: Context, call: Callable[[Message, Context], Message]) -> Message:
    calls = context.state["calls"]["number"] + 1 if "calls" in context.state else 1
    context.state["calls"] = ConfigRecord({"number": calls})
    reply = call(message, context)
    reply.content["metrics"]["calls"] = calls
    return reply


modded = ClientApp(mods=[message_size_mod, counting])


@modded.train(mods=[doubling])
def step(message: Message, context: Context) -> Message:
    arrays = [array + message.content["config"]["step"] for array in message.content["arrays"].to_numpy_ndarrays()]
    return answer(message, arrays=ArrayRecord(arrays), metrics=MetricRecord({"num-examples": 1}))


def modded_server(found: Found) -> ServerApp:
    strategy = FedAvg(fraction_evaluate=0.0, **ALL)
    return started(lambda _: strategy, zeros(2), found, train_config=ConfigRecord({"step": 0.5}))


# State: a residual that the client keeps and adds to its next update.

stateful = ClientApp()


@stateful.train()
def residual(message: Message, context: Context) -> Message:
    kept = context.state["residual"].to_numpy_ndarrays()[0] if "residual" in context.state else np.zeros(4)
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    wanted = np.arange(4) * (1 + partition(context)) + kept
    sent = np.where(wanted == wanted.max(), wanted, 0.0)
    context.state["residual"] = ArrayRecord([wanted - sent])
    norm = float(np.abs(wanted - sent).sum())
    return answer(
        message, arrays=ArrayRecord([weights + sent]), metrics=MetricRecord({"num-examples": 1, "residual": norm})
    )


def stateful_server(found: Found) -> ServerApp:
    return started(lambda _: FedAvg(fraction_evaluate=0.0, **ALL), zeros(4), found)


# Evaluation alone: no client trains.


def evaluating_server(found: Found) -> ServerApp:
    strategy = FedAvg(fraction_train=0.0, **{**ALL, "min_train_nodes": 0})
    return started(lambda _: strategy, ArrayRecord([np.full(2, 1.5)]), found, rounds=2)


# A lifespan on both sides: what is set up before each message and torn down after it.

living = ClientApp()


@living.lifespan()
def client_life(context: Context) -> Iterator[None]:
    context.state["life"] = ConfigRecord({"open": 1})
    yield
    ended = context.state["ended"]["number"] + 1 if "ended" in context.state else 1
    context.state["ended"] = ConfigRecord({"number": ended})
    del context.state["life"]


@living.train()
def live(message: Message, context: Context) -> Message:
    ended = context.state["ended"]["number"] if "ended" in context.state else 0
    record = MetricRecord({"num-examples": 1, "open": context.state["life"]["open"], "ended": ended})
    return answer(message, arrays=message.content["arrays"], metrics=record)


def living_server(found: Found) -> ServerApp:
    app = started(lambda _: FedAvg(fraction_evaluate=0.0, **ALL), zeros(1), found)

    @app.lifespan()
    def server_life(context: Context) -> Iterator[None]:
        found.append("up")
        yield
        found.append("down")

    return app


# A strategy of its own: the learning rate decays by the round's config, and the server evaluates the model itself.


class Decaying(FedAvg):
    """FedAvg that halves the learning rate each round and notes how many clients answered."""

    def __init__(self, found: Found, **options: object) -> None:
        super().__init__(**options)
        self.found = found

    def configure_train(self, server_round, arrays, config, grid):
        config["lr"] = 1.0 / 2 ** (server_round - 1)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.found.append((server_round, len(replies), sum(reply.has_error() for reply in replies)))
        return super().aggregate_train(server_round, replies)


decaying = ClientApp()


@decaying.train()
def descend(message: Message, context: Context) -> Message:
    config = message.content["config"]
    if config["server-round"] == 2 and partition(context) == 3:
        raise RuntimeError("gone for a round")
    arrays = [array - config["lr"] for array in message.content["arrays"].to_numpy_ndarrays()]
    return answer(message, arrays=ArrayRecord(arrays), metrics=MetricRecord({"num-examples": 1, "lr": config["lr"]}))


def decaying_server(found: Found) -> ServerApp:
    def centrally(number: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"norm": float(np.abs(arrays.to_numpy_ndarrays()[0]).sum())})

    return started(
        lambda found: Decaying(found, fraction_evaluate=0.0, **ALL),
        zeros(2),
        found,
        train_config=ConfigRecord({"lr": 0.0}),
        evaluate_fn=centrally,
    )


# PyTorch: state dicts both ways, with BatchNorm's integer buffer; a proximal term by the strategy's config.

net = ClientApp()


def module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


@net.train()
def proximal(message: Message, context: Context) -> Message:
    model = module()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    start = [p.detach().clone() for p in model.parameters()]
    x = torch.linspace(0, 1, 12).reshape(4, 3) * (1 + partition(context))
    for _ in range(2):
        drift = sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), start, strict=True))
        loss = model(x).pow(2).mean() + message.content["config"]["proximal-mu"] / 2 * drift
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    metrics = MetricRecord({"num-examples": 4, "loss": float(loss.detach())})
    return answer(message, arrays=ArrayRecord(model.state_dict()), metrics=metrics)


def net_server(found: Found) -> ServerApp:
    model = module()
    state = OrderedDict((name, torch.full_like(value, 1)) for name, value in model.state_dict().items())
    return started(
        lambda _: FedProx(fraction_evaluate=0.0, proximal_mu=0.5, **ALL), ArrayRecord(state), found, rounds=2
    )


# An optimizer on the server.


def adam_server(found: Found) -> ServerApp:
    return started(lambda _: FedAdam(fraction_evaluate=0.0, eta=0.5, **ALL), zeros(3), found)


SERVERS: dict[str, tuple[Callable[[Found], ServerApp], ClientApp]] = {
    "plain": (plain_server, plain),
    "linear model": (linear_server, linear),
    "boosted trees": (boosted_server, boosted),
    "clipped by the server": (clipped(DifferentialPrivacyServerSideFixedClipping), pushing),
    "clipped by the client": (clipped(DifferentialPrivacyClientSideFixedClipping), clipping),
    "mods": (modded_server, modded),
    "residual": (stateful_server, stateful),
    "evaluation alone": (evaluating_server, plain),
    "lifespan": (living_server, living),
    "own strategy": (decaying_server, decaying),
    "PyTorch": (net_server, net),
    "FedAdam": (adam_server, plain),
}
