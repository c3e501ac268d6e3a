"""A legacy Flower app: NumPyClient, client_fn, server_fn with ServerAppComponents; written like those before the message API."""

from __future__ import annotations

import numpy as np
from flwr.app import ConfigRecord, Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

CLIENTS, ROUNDS = 6, 3


class Client(NumPyClient):
    """Adds its partition's number to the weights; keeps how often it trained in the context."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.partition = int(context.node_config["partition-id"])

    def get_parameters(self, config):
        return [np.full(4, float(self.partition))]

    def get_properties(self, config):
        return {"partition": self.partition}

    def fit(self, parameters, config):
        state = self.context.state
        times = state["seen"]["times"] + 1 if "seen" in state else 1
        state["seen"] = ConfigRecord({"times": times})
        if self.partition == config.get("broken", -1):
            raise ValueError("by design")
        draw = float(np.random.random())  # noqa: NPY002
        metrics = {"partition": self.partition, "times": times, "draw": draw}
        return [p + self.partition for p in parameters], 1 + self.partition, metrics

    def evaluate(self, parameters, config):
        return float(np.mean(parameters[0])), 1, {"partition": self.partition}


def client_fn(context: Context):
    return Client(context).to_client()


client_app = ClientApp(client_fn=client_fn)


class Strategy(FedAvg):
    """FedAvg that remembers who answered with what."""

    def __init__(self, found: list[object], **options) -> None:
        super().__init__(**options)
        self.found = found

    def aggregate_fit(self, server_round, results, failures):
        seen = sorted((r.metrics["partition"], r.metrics["times"], r.metrics["draw"]) for _, r in results)
        self.found.append((seen, len(failures), r_values(results)))
        return super().aggregate_fit(server_round, results, failures)


def r_values(results) -> list[float]:
    return sorted(float(parameters_to_ndarrays(r.parameters)[0][0]) for _, r in results)


def server_app(found: list[object], **config) -> ServerApp:
    def server_fn(context: Context) -> ServerAppComponents:
        strategy = Strategy(
            found,
            fraction_fit=1.0,
            min_available_clients=CLIENTS,
            on_fit_config_fn=lambda number: {**config, "round": number},
            initial_parameters=ndarrays_to_parameters([np.zeros(4)]) if "given" in config else None,
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=ROUNDS))

    return ServerApp(server_fn=server_fn)
