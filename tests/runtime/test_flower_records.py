"""Records whose class inherits from one of Flower's, as Flower's deprecated names do, are booked as that one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import ConfigsRecord, MetricsRecord, ParametersRecord
from flwr.serverapp import Grid, ServerApp

from fl_sim.communication.flower_private import RUN_ID, identified, outbound_bytes
from fl_sim.communication.flower_traffic import protocol_bytes
from fl_sim.runtime.flower_run import run_apps

Content = Callable[[int], RecordDict]
SECTIONS = ("direction", "section")


class Named(ArrayRecord):
    """A record of a user's own class."""


def content(arrays: type[ArrayRecord], metrics: type[MetricRecord], config: type[ConfigRecord]) -> Content:
    def made(size: int) -> RecordDict:
        values = {"w": Array(np.zeros(size, np.float32))}
        return RecordDict(
            {"arrays": arrays(values), "metrics": metrics({"num-examples": 1}), "config": config({"lr": 0.5})}
        )

    return made


def booked(made: Content, engine: str) -> tuple[dict[tuple[str, ...], int], dict[str, int]]:
    """Bytes by direction and section, and protocol bytes by direction, of a round of 1000 values down and 2000 up."""
    server, client = ServerApp(), ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return Message(made(2000), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = grid.get_node_ids()
        for reply in grid.send_and_receive([Message(made(1000), node, "train", group_id="1") for node in nodes]):
            assert not reply.has_error(), reply.error

    ledger = run_apps(server, client, num_clients=2, engine=engine).ledger
    return ledger.total(by=SECTIONS), ledger.total(by=("direction",), column="protocol_bytes")


@pytest.mark.parametrize("engine", ["inline", "workers"])
@pytest.mark.parametrize("arrays", [ParametersRecord, Named])
def test_inherited_records_are_booked_as_flowers_own(arrays: type[ArrayRecord], engine: str) -> None:
    own = booked(content(ArrayRecord, MetricRecord, ConfigRecord), engine)
    assert own[0][("up", "dense")] == 2 * len(Array(np.zeros(2000, np.float32)).data), "two clients"
    assert booked(content(arrays, MetricsRecord, ConfigsRecord), engine) == own


def test_two_kinds_of_record_with_the_same_entries_are_not_sized_as_one_another() -> None:
    for record in (ArrayRecord(), ConfigRecord(), MetricRecord()):
        with identified(RUN_ID):
            message = Message(RecordDict({"a": record}), 1, "train")
        assert protocol_bytes(message, direction="down") == outbound_bytes(message)
