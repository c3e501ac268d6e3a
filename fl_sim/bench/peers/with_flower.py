"""Flower's own simulation, FedAvg and array records on a workload: python with_flower.py FOLDER, its folder in PYTHONPATH."""

from __future__ import annotations

import json
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn
from torch.nn import functional

client = ClientApp()
server = ServerApp()


def network(layers: list[list[object]], dropout: bool) -> nn.Sequential:
    """The layers of work.json as modules."""
    net = nn.Sequential(*(getattr(nn, str(kind))(*numbers) for kind, *numbers in layers))
    for layer in net:
        if isinstance(layer, nn.Dropout) and not dropout:
            layer.p = 0.0
    return net


@lru_cache(maxsize=1)
def resident(place: str) -> tuple[int, float, nn.Module, Tensor, Tensor]:
    """Batch size, learning rate, model and data, which an actor reads once."""
    torch.set_num_threads(1)
    work, data = json.loads((Path(place) / "work.json").read_text()), np.load(Path(place) / "data.npz")
    net = network(work["layers"], work["dropout"]).train()
    return work["batch"], work["lr"], net, torch.from_numpy(data["inputs"]), torch.from_numpy(data["targets"])


@client.train()
def train(message: Message, context: Context) -> Message:
    """Load the arrays, train on the client's samples in their order, and send the arrays back."""
    arrays, config = message.content["arrays"], message.content["config"]
    assert isinstance(arrays, ArrayRecord)
    batch, lr, net, inputs, targets = resident(str(config["folder"]))
    net.load_state_dict(arrays.to_torch_state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr, fused=True)
    user = int(context.node_config["partition-id"])
    for some, wanted in zip(inputs[user].split(batch), targets[user].split(batch)):  # noqa: B905
        optimizer.zero_grad()
        functional.cross_entropy(net(some), wanted).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(targets[user])})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """FedAvg; a line after each round."""
    place = Path(sys.argv[1])
    work = json.loads((place / "work.json").read_text())
    fits: list[int] = []
    start = [0.0]

    def counted(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        fits.append(len(contents))
        return MetricRecord()

    def after_round(number: int, arrays: ArrayRecord) -> None:
        now = time.perf_counter()
        if number:
            print("ROUND", json.dumps({"fits": fits[-1], "seconds": now - start[0]}), flush=True)
        start[0] = time.perf_counter()

    strategy = FedAvg(
        fraction_train=work["cohort"] / work["clients"],
        fraction_evaluate=0.0,
        min_train_nodes=work["cohort"],
        min_available_nodes=work["clients"],
        train_metrics_aggr_fn=counted,
    )
    initial = ArrayRecord({name: torch.from_numpy(value) for name, value in np.load(place / "initial.npz").items()})
    config = ConfigRecord({"folder": str(place.resolve())})
    rounds = work["warmup"] + work["rounds"]
    result = strategy.start(grid, initial, num_rounds=rounds, train_config=config, evaluate_fn=after_round)
    np.savez(place / "answer.npz", **{name: array.numpy() for name, array in result.arrays.items()})  # type: ignore[arg-type]


def main() -> None:
    """Run the apps with one core for each actor."""
    work = json.loads((Path(sys.argv[1]) / "work.json").read_text())
    actors = {"init_args": {"num_cpus": work["processes"]}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, work["clients"], backend_config=actors)


if __name__ == "__main__":
    import with_flower  # type: ignore[import-not-found]  # by its name: what actors import stays there, what `__main__` has is sent with every message

    with_flower.main()
