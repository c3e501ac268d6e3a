"""Flower apps with rounds of their own over the Grid, and legacy ones; in the shape of public apps, written anew."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from flower_apps import CLIENTS, all_nodes, answer
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Code, EvaluateIns, EvaluateRes, FitIns, FitRes, Status, ndarrays_to_parameters
from flwr.common import parameters_to_ndarrays as arrays_of
from flwr.server import History, Server, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.strategy import FedAdam, FedAvg
from flwr.serverapp import Grid, ServerApp

Found = list[object]


def looping(rounds: Callable[[Grid, list[int], Found], None]) -> Callable[[Found], ServerApp]:
    """A ServerApp that calls a function with the nodes in the order of their partitions."""

    def server(found: Found) -> ServerApp:
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            replies = grid.send_and_receive([Message(RecordDict(), node, "query.who") for node in all_nodes(grid)])
            place = {r.metadata.src_node_id: r.content["who"]["partition"] for r in replies}
            rounds(grid, sorted(place, key=place.__getitem__), found)

        return app

    return server


def known() -> ClientApp:
    """A ClientApp that says which partition it has."""
    app = ClientApp()

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        return answer(message, who=ConfigRecord({"partition": context.node_config["partition-id"]}))

    return app


def asked(grid: Grid, nodes: list[int], kind: str, contents: list[RecordDict]) -> list[RecordDict]:
    """What the nodes answer, in their order."""
    replies = grid.send_and_receive(
        [Message(content, node, kind) for node, content in zip(nodes, contents, strict=True)]
    )
    by_node = {reply.metadata.src_node_id: reply.content for reply in replies}
    return [by_node[node] for node in nodes]


# Survival: times and events come as arrays, the server fits one curve over all of them.

survival = known()


@survival.query("events")
def events(message: Message, context: Context) -> Message:
    own = context.node_config["partition-id"]
    times, seen = np.arange(1, 6) + own, np.arange(5) % 2 == own % 2
    return answer(message, events=ArrayRecord({"times": Array(times), "seen": Array(seen)}))


def survive(grid: Grid, nodes: list[int], found: Found) -> None:
    contents = asked(grid, nodes, "query.events", [RecordDict()] * CLIENTS)
    times = np.concatenate([c["events"]["times"].numpy() for c in contents])
    seen = np.concatenate([c["events"]["seen"].numpy() for c in contents])
    curve, left = [], 1.0
    for moment in sorted(set(times[seen].tolist())):
        left *= 1 - (seen & (times == moment)).sum() / (times >= moment).sum()
        curve.append((moment, round(float(left), 6)))
    found.append(curve)


# Actions: several kinds of messages in one round, each with handlers of its own, and other contents for each node.

acting = known()


@acting.train("warm")
def warm(message: Message, context: Context) -> Message:
    context.state["scale"] = MetricRecord({"scale": message.content["config"]["scale"]})
    return answer(message)


@acting.train("main")
def work(message: Message, context: Context) -> Message:
    scale = context.state["scale"]["scale"]
    arrays = [scale * array for array in message.content["arrays"].to_numpy_ndarrays()]
    return answer(message, arrays=ArrayRecord(arrays))


@acting.evaluate("fast")
def fast(message: Message, context: Context) -> Message:
    return answer(message, metrics=MetricRecord({"keys": [len(context.state), len(message.content)]}))


def act(grid: Grid, nodes: list[int], found: Found) -> None:
    asked(grid, nodes, "train.warm", [RecordDict({"config": ConfigRecord({"scale": 1.0 + p})}) for p in range(CLIENTS)])
    content = RecordDict({"arrays": ArrayRecord([np.ones(2)])})
    for _ in range(2):
        replies = asked(grid, nodes, "train.main", [content] * CLIENTS)
        total = sum(reply["arrays"].to_numpy_ndarrays()[0] for reply in replies)
        found.append(total.tolist())
        content = RecordDict({"arrays": ArrayRecord([total])})
    found.append([list(r["metrics"]["keys"]) for r in asked(grid, nodes, "evaluate.fast", [RecordDict()] * CLIENTS)])


# Asynchronous: work is pushed, and what is finished is folded in and answered with new work.

waiting = known()


@waiting.train()
def one_more(message: Message, context: Context) -> Message:
    number = context.state["done"]["number"] + 1 if "done" in context.state else 1
    context.state["done"] = ConfigRecord({"number": number})
    return answer(message, metrics=MetricRecord({"done": number, "own": context.node_config["partition-id"]}))


def fold(grid: Grid, nodes: list[int], found: Found) -> None:
    left, open_ids, done = dict.fromkeys(nodes, 3), set(), []
    open_ids |= set(grid.push_messages([Message(RecordDict(), node, "train") for node in nodes]))
    while open_ids:
        for reply in grid.pull_messages(open_ids):
            open_ids.discard(reply.metadata.reply_to_message_id)
            done.append((reply.content["metrics"]["own"], reply.content["metrics"]["done"]))
            node = reply.metadata.src_node_id
            left[node] -= 1
            if left[node]:
                open_ids |= set(grid.push_messages([Message(RecordDict(), node, "train")]))
        time.sleep(0.01)
    found.append(sorted(done))


# Capacities: each client gets a slice of the weights as wide as it can hold; columns are averaged over those that have them.

slicing = known()


@slicing.query("width")
def width(message: Message, context: Context) -> Message:
    return answer(message, config=ConfigRecord({"width": 1 + context.node_config["partition-id"] // 2}))


@slicing.train()
def widen(message: Message, context: Context) -> Message:
    own = context.node_config["partition-id"]
    return answer(
        message, arrays=ArrayRecord([a + own for a in message.content["arrays"].to_numpy_ndarrays(keep_input=False)])
    )


def cut(grid: Grid, nodes: list[int], found: Found) -> None:
    widths = [c["config"]["width"] for c in asked(grid, nodes, "query.width", [RecordDict()] * CLIENTS)]
    weights = np.zeros((2, 2))
    for _ in range(2):
        contents = [RecordDict({"arrays": ArrayRecord([weights[:, :wide].copy()])}) for wide in widths]
        sums, counts = np.zeros((2, 2)), np.zeros(2)
        for wide, reply in zip(widths, asked(grid, nodes, "train", contents), strict=True):
            sums[:, :wide] += reply["arrays"].to_numpy_ndarrays()[0]
            counts[:wide] += 1
        weights = sums / counts
    found.append(weights.tolist())


# Legacy: a NumPyClient under FedAvg, and a Client under FedAdam; histories are what the server keeps.


class Adder(NumPyClient):
    def __init__(self, partition: int) -> None:
        self.partition = partition

    def fit(self, parameters, config):
        return [p + self.partition * config["step"] for p in parameters], 1, {"own": self.partition}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 1 + self.partition, {"own": self.partition}


class Raw(Client):
    def fit(self, ins: FitIns) -> FitRes:
        parameters = ndarrays_to_parameters([array + 1.0 for array in arrays_of(ins.parameters)])
        return FitRes(Status(Code.OK, ""), parameters, 2, {})

    def evaluate(self, ins: EvaluateIns) -> EvaluateRes:
        return EvaluateRes(Status(Code.OK, ""), float(arrays_of(ins.parameters)[0].sum()), 2, {})


numpy_client = ClientApp(client_fn=lambda context: Adder(int(context.node_config["partition-id"])).to_client())
raw_client = ClientApp(client_fn=lambda context: Raw())


def legacy(kind: type[FedAvg], **options: object) -> Callable[[Found], ServerApp]:
    """A server of ServerAppComponents; the model after each round, and the clients' metrics, go to `found`."""

    def server(found: Found) -> ServerApp:
        def noted(number: int, parameters: list[np.ndarray], config: object) -> tuple[float, dict[str, float]]:
            found.append((number, np.round(parameters[0], 6).tolist()))
            return 0.0, {}

        def kept(metrics: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
            found.append(sorted((count, own.get("own", -1)) for count, own in metrics))
            return {}

        def server_fn(context: Context) -> ServerAppComponents:
            strategy = kind(
                min_fit_clients=CLIENTS,
                min_evaluate_clients=CLIENTS,
                min_available_clients=CLIENTS,
                initial_parameters=ndarrays_to_parameters([np.zeros(2)]),
                on_fit_config_fn=lambda number: {"step": 0.5 * number},
                evaluate_fn=noted,
                fit_metrics_aggregation_fn=kept,
                evaluate_metrics_aggregation_fn=kept,
                **options,
            )
            return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

        return ServerApp(server_fn=server_fn)

    return server


# Legacy: a Server of one's own, over clients that keep a part of the model in their state, as FedBN does.


class Personal(NumPyClient):
    """Trains a bias that is its own and never travels."""

    def __init__(self, context: Context) -> None:
        self.own, self.records = int(context.node_config["partition-id"]), context.state.array_records

    def bias(self) -> np.ndarray:
        return self.records["own"]["bias"].numpy() if "own" in self.records else np.zeros(2)

    def fit(self, parameters, config):
        self.records["own"] = ArrayRecord({"bias": Array(self.bias() + self.own)})
        return [parameters[0] + self.bias()], 1, {}

    def evaluate(self, parameters, config):
        return float((parameters[0] + self.bias()).sum()), 1, {}


personal_client = ClientApp(client_fn=lambda context: Personal(context).to_client())


def own_server(found: Found) -> ServerApp:
    """A Server whose `fit` tells what the history holds, and the last parameters."""

    class Telling(Server):
        def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
            history, seconds = super().fit(num_rounds, timeout)
            found.append(history.losses_distributed)
            found.append([array.tolist() for array in arrays_of(self.parameters)])
            return history, seconds

    def server_fn(context: Context) -> ServerAppComponents:
        strategy = FedAvg(
            min_fit_clients=CLIENTS,
            min_evaluate_clients=CLIENTS,
            min_available_clients=CLIENTS,
            initial_parameters=ndarrays_to_parameters([np.zeros(2)]),
        )
        server = Telling(client_manager=SimpleClientManager(), strategy=strategy)
        return ServerAppComponents(server=server, config=ServerConfig(num_rounds=3))

    return ServerApp(server_fn=server_fn)


LOOPS: dict[str, tuple[Callable[[Found], ServerApp], ClientApp]] = {
    "survival": (looping(survive), survival),
    "actions": (looping(act), acting),
    "asynchronous": (looping(fold), waiting),
    "capacities": (looping(cut), slicing),
    "NumPyClient": (legacy(FedAvg), numpy_client),
    "Client": (legacy(FedAdam, eta=0.5), raw_client),
    "own server": (own_server, personal_client),
}
