"""A Flower app whose clients do nothing, in Flower's own simulation and on our engines: what a round costs beside training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from statistics import median

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_sim.bench.contest import Flat, spread_of
from fl_sim.communication.flower_private import simulate
from fl_sim.runtime.flower_run import run_apps

CLIENTS = 100
SIZES: Mapping[str, tuple[int, str]] = {"464k": (464_154, "inline"), "50k": (50_624, "workers")}
"""Name -> (parameters, the engine of ours that runs the same app)."""
WARMUP = 2
client = ClientApp()


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Send back what came."""
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


def server(parameters: int, clients: int, rounds: int, ends: list[float]) -> ServerApp:
    """FedAvg over all clients; the time at the end of each round goes to `ends`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        start = ArrayRecord([np.zeros(parameters, np.float32)])
        strategy.start(
            grid, start, num_rounds=rounds, evaluate_fn=lambda number, arrays: ends.append(time.perf_counter())
        )

    return app


def round_seconds(run: Callable[[ServerApp], object], parameters: int, *, clients: int, rounds: int) -> list[float]:
    """Seconds of each round after the first ones, as a runtime takes them."""
    ends: list[float] = []
    run(server(parameters, clients, rounds + WARMUP, ends))
    return [after - before for before, after in pairwise(ends)][WARMUP:]


def beside_flower(repeats: int, *, clients: int = CLIENTS, sizes: Mapping[str, tuple[int, str]] = SIZES) -> Flat:
    """Rounds a second of the same app here over those in Flower's simulation on two Ray actors, and seconds of both."""
    flat: Flat = {}
    flowers = partial(simulate, client_app=client, nodes=clients, workers=2)
    for name, (parameters, engine) in sizes.items():
        theirs = round_seconds(flowers, parameters, clients=clients, rounds=repeats)
        ours = partial(run_apps, client_app=client, num_clients=clients, engine=engine)
        own = round_seconds(ours, parameters, clients=clients, rounds=5 * repeats)
        flat |= spread_of(f"app_{name}_flower_s_per_round", theirs)
        flat |= spread_of(f"app_{name}_{engine}_s_per_round", own)
        flat[f"app_{name}_{engine}_over_flower"] = median(theirs) / median(own)
    return flat
