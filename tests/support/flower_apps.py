"""Flower apps in the shape of public ones, written anew: what travels and what is kept, with next to no computation."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

CLIENTS = 4


def answer(message: Message, **records: ArrayRecord | ConfigRecord | MetricRecord) -> Message:
    return Message(RecordDict(records), reply_to=message)


def all_nodes(grid: Grid) -> list[int]:
    """The nodes, once there are as many as clients: on Flower they join while the ServerApp starts."""
    while len(nodes := sorted(grid.get_node_ids())) < CLIENTS:
        time.sleep(0.1)
    return nodes


def sending(kind: str, content: Callable[[int, int], RecordDict], found: list[object], *, rounds: int = 2) -> ServerApp:
    """A ServerApp of a loop: (round, place) -> content to each node; the replies, in the order of the nodes, go to `found`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = all_nodes(grid)
        for number in range(1, rounds + 1):
            messages = [
                Message(content(number, place), node, kind, group_id=str(number)) for place, node in enumerate(nodes)
            ]
            replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
            found.append([replies[node] for node in nodes])

    return app


# Process state: what a careless client leaves behind.

leaving = ClientApp()


def process_state() -> list[object]:
    return [
        torch.is_grad_enabled(),
        str(torch.get_default_dtype()),
        os.getcwd(),
        os.environ.get("LEFT_BY_A_CLIENT", ""),
        torch.initial_seed() > 0,
    ]


@leaving.train()
def leave(message: Message, context: Context) -> Message:
    state, draws = process_state(), [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    os.chdir("/")
    os.environ["LEFT_BY_A_CLIENT"] = "1"
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    if context.node_config["partition-id"] == 2:
        raise RuntimeError("and raises")
    return answer(message, told=ConfigRecord({"state": [str(s) for s in state], "draws": draws}))


# A tree ensemble as bytes in one array record, as boosted trees send theirs: each client appends its own.

trees = ClientApp()


@trees.train()
def grow(message: Message, context: Context) -> Message:
    sent = message.content["model"]["0"].numpy().tobytes()
    grown = sent + bytes([context.node_config["partition-id"]]) * 100
    record = ArrayRecord([np.frombuffer(grown, dtype=np.uint8)])
    return answer(message, model=record, metrics=MetricRecord({"num-examples": 10, "auc": 0.5}))


# Analytics: a query, histograms as a list of integers; nothing else moves.

analytics = ClientApp()


@analytics.query()
def histogram(message: Message, context: Context) -> Message:
    draws = np.random.default_rng(context.node_config["partition-id"]).integers(0, 5, 100)
    counts = np.bincount(draws, minlength=5).tolist()
    return answer(message, query_results=MetricRecord({"counts": counts}))


@analytics.query("columns")
def columns(message: Message, context: Context) -> Message:
    return answer(message, query_results=ConfigRecord({"columns": list(message.content["config"]["columns"])}))


# Vertical: features stay; embeddings up, gradients down in messages that nobody waits for.

vertical = ClientApp()


@vertical.query("embed")
def embed(message: Message, context: Context) -> Message:
    weight = float(context.state["own"]["weight"]) if "own" in context.state else 1.0
    rows = np.arange(3.0) * weight * (1 + context.node_config["partition-id"])
    return answer(message, embedding=ArrayRecord({"embedding": Array(rows)}))


@vertical.train("apply_gradients")
def apply_gradients(message: Message, context: Context) -> Message:
    weight = float(context.state["own"]["weight"]) if "own" in context.state else 1.0
    step = float(message.content["gradients"]["gradient"].numpy().sum())
    context.state["own"] = MetricRecord({"weight": weight - 0.1 * step})
    return answer(message)


def vertical_server(found: list[object], rounds: int = 3) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = all_nodes(grid)
        for _ in range(rounds):
            replies = grid.send_and_receive(Message(RecordDict(), node, "query.embed") for node in nodes)
            rows = {r.metadata.src_node_id: r.content["embedding"]["embedding"].numpy() for r in replies}
            found.append([rows[node].tolist() for node in nodes])
            content = RecordDict({"gradients": ArrayRecord({"gradient": Array(np.ones(2))})})
            grid.push_messages(Message(content, node, "train.apply_gradients") for node in nodes)

    return app


# Secure aggregation in its four stages: keys, shares and masked vectors are bytes in ConfigRecords.

P = 2**31 - 1
secure = ClientApp()


def mask(first: int, second: int, size: int) -> np.ndarray:
    return np.random.default_rng(min(first, second) * 1000 + max(first, second)).integers(0, P, size)


@secure.train("keys")
def keys(message: Message, context: Context) -> Message:
    return answer(message, keys=ConfigRecord({"public": bytes([context.node_config["partition-id"]]) * 32}))


@secure.train("masked")
def masked(message: Message, context: Context) -> Message:
    others = [key[0] for key in message.content["keys"]["publics"]]
    own = int(context.node_config["partition-id"])
    vector = np.full(1000, own + 1, dtype=np.int64)
    for other in others:
        if other != own:
            vector = (vector + (1 if own < other else -1) * mask(own, other, 1000)) % P
    return answer(message, masked=ConfigRecord({"vector": vector.tobytes()}))


def secure_server(found: list[object]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = all_nodes(grid)
        replies = grid.send_and_receive(Message(RecordDict(), node, "train.keys", group_id="1") for node in nodes)
        publics = [reply.content["keys"]["public"] for reply in replies]
        content = RecordDict({"keys": ConfigRecord({"publics": publics})})
        replies = grid.send_and_receive(Message(content, node, "train.masked", group_id="1") for node in nodes)
        vectors = [np.frombuffer(reply.content["masked"]["vector"], dtype=np.int64) for reply in replies]
        found.append((sum(vectors) % P).tolist())

    return app
