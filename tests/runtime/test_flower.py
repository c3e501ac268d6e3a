"""Next to Flower itself: its FedAvg gives our result, its strategies run on our Grid, our private names still exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from fl_sim.communication.flower_traffic import protocol_bytes
from fl_sim.communication.messages import content, payload
from fl_sim.core.seeding import Purpose, generator
from fl_sim.runtime import flower_compat
from fl_sim.runtime.grids.inline import InlineGrid
from fl_sim.simulation.federation import Federation
from fl_sim.training import load, snapshot

PLAIN = ["model.name=mlp", "cohort.size=6", "rounds=3", "training.lr=0.05"]


def plain_flower_app(federation: Federation) -> ClientApp:
    """A message-API ClientApp as Flower's users write it: dense arrays both ways."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        data = federation.data.train.subset(federation.partitions[partition])
        arrays = message.content["arrays"].to_torch_state_dict()
        model = load(federation.first.model, dict(arrays))
        number = int(message.content["config"]["server-round"])
        metrics = federation.experiment.training.fit(model, data, rng=generator(0, number, partition, Purpose.CLIENT))
        record = MetricRecord({"num-examples": len(data), "loss": metrics["loss"]})
        return Message(RecordDict({"arrays": ArrayRecord(dict(snapshot(model))), "metrics": record}), reply_to=message)

    return app


def flower_result(federation: Federation, strategy: FedAvg, rounds: int) -> dict[str, torch.Tensor]:
    """Flower's own strategy and loop on our Grid."""
    app, results = ServerApp(), {}

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(dict(federation.first.initial)), num_rounds=rounds
        )
        results.update(result.arrays.to_torch_state_dict())

    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    app(InlineGrid(plain_flower_app(federation), len(federation.partitions)), context)
    return results


def test_dense_fedavg_equals_flowers_own(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, *PLAIN))
    theirs = flower_result(federation, FedAvg(fraction_train=1.0, fraction_evaluate=0.0), rounds=3)
    ours = run_tiny(tmp_path, *PLAIN)
    for name, value in ours.params.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", [FedAdam, FedMedian])
def test_flowers_strategies_run_on_our_grid(tmp_path: Path, strategy: type[FedAvg]) -> None:
    federation = Federation.build(tiny(tmp_path, *PLAIN))
    result = flower_result(federation, strategy(fraction_train=1.0, fraction_evaluate=0.0), rounds=2)
    assert result.keys() == federation.first.initial.keys()
    assert any(not torch.equal(result[n], federation.first.initial[n]) for n in result)


def test_the_private_names_still_do_what_we_need() -> None:
    flower_compat.adopt_identity()
    message = Message(content(b"x" * 100, config={"round": 1}), 5, "train", group_id="1")
    flower_compat.set_message_id(message, "17")
    assert message.metadata.message_id == "17"
    assert payload(message.content) == b"x" * 100
    assert flower_compat.Run.create_empty(3).run_id == 3


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 100_000, 5 * 2**20 - 1, 5 * 2**20 + 1, 12_000_000])
@pytest.mark.parametrize("number", [1, 127, 128, 20_000])
def test_remembered_protocol_bytes_equal_the_full_calculation(size: int, number: int) -> None:
    flower_compat.adopt_identity()
    data = (
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        .numpy()
        .tobytes()
    )
    down = Message(content(data, config={"round": number, "seed": 3, "mu": 0.5}), 5, "train", group_id=str(number))
    up = Message(content(data, metrics={"num-examples": number, "loss": 0.25}), reply_to=down)
    for _ in range(2):
        assert protocol_bytes(down, direction="down") == flower_compat.outbound_bytes(down)
        assert protocol_bytes(up, direction="up") == flower_compat.inbound_bytes(up)


def test_protocol_bytes_have_not_changed() -> None:
    """Golden values for flwr 1.41: a change of Flower's framing shows here first."""
    flower_compat.adopt_identity()
    data = bytes(range(256)) * 40
    down = Message(content(data, config={"round": 1, "seed": 0}), 5, "train", group_id="1")
    up = Message(content(data, metrics={"num-examples": 10, "loss": 0.5}), reply_to=down)
    overhead = (protocol_bytes(down, direction="down") - len(data), protocol_bytes(up, direction="up") - len(data))
    assert overhead == GOLDEN


GOLDEN = (1310, 1895)
