"""Flower's own SecAgg+ workflow and mod, with a client that drops out: what the server may know is the mean of the rest."""

from __future__ import annotations

import time

import numpy as np
import pytest
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import Grid, ServerApp

from fl_sim.runtime.flower_run import AppRun, run_apps

CLIENTS, SIZE = 5, 1000
LATE_S = 9.0


class Client(NumPyClient):
    def __init__(self, partition: int, late: int | None) -> None:
        self.partition, self.late = partition, late

    def fit(self, parameters, config):
        if self.partition == self.late:
            time.sleep(LATE_S)
        return [np.full(SIZE, float(self.partition))], 1, {}

    def evaluate(self, parameters, config):
        return 0.0, 1, {}


def run(engine: str, late: int | None = None) -> tuple[AppRun, float]:
    client = ClientApp(
        client_fn=lambda context: Client(context.node_config["partition-id"], late).to_client(), mods=[secaggplus_mod]
    )
    server, found = ServerApp(), {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = ndarrays_to_parameters([np.zeros(SIZE)])
        strategy = FedAvg(fraction_evaluate=0.0, min_available_clients=CLIENTS, initial_parameters=start)
        legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=1), strategy=strategy)
        secure = SecAggPlusWorkflow(
            num_shares=3, reconstruction_threshold=2, max_weight=10, timeout=None if late is None else LATE_S * 2 / 3
        )
        DefaultWorkflow(fit_workflow=secure)(grid, legacy)
        found["mean"] = float(next(iter(legacy.state.array_records[MAIN_PARAMS_RECORD].values())).numpy().mean())

    return run_apps(server, client, num_clients=CLIENTS, engine=engine), found["mean"]


@pytest.mark.parametrize("engine", ["inline", "workers"])
def test_the_sum_is_right_and_masked_vectors_are_booked(engine: str) -> None:
    ran, mean = run(engine)
    assert mean == pytest.approx(np.mean(range(CLIENTS)), abs=1e-3)
    up = ran.ledger.total(by=("round", "section"), where={"direction": "up"})
    assert up[1, "dense"] == 0
    # A masked vector holds a 64-bit integer for each of 1,000 values; beside it keys and shares.
    assert 8 * SIZE * CLIENTS < up[1, "config"] < 1.5 * 8 * SIZE * CLIENTS


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["inline", "workers"])
def test_a_client_that_is_late_is_left_out(engine: str) -> None:
    _, mean = run(engine, late=1)
    assert mean == pytest.approx((0 + 2 + 3 + 4) / 4, abs=1e-3)
