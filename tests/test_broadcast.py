"""The sparse downlink: every client ends up with the published model bit for bit, and nothing is lost, only late."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_sim.broadcast import Published, SparseBroadcast, received
from fl_sim.codecs import Schema
from fl_sim.types import FlatParams, Mask, UserError
from fl_sim.wire import Exchange

SHAPES = {"conv": (8, 4, 3, 3), "fc": (10, 7), "bias": (10,), "bn.running_mean": (8,), "bn.running_var": (8,)}
SPARSE = ["wire.broadcast.density=0.1"]


def model(seed: int) -> FlatParams:
    generator = torch.Generator().manual_seed(seed)
    return FlatParams.pack({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def exchange() -> Exchange:
    return Exchange(Schema.of(model(0), ["conv", "fc"]))


def published(values: str = "float32", density: float = 0.2, window: int = 16) -> Published:
    return Published(SparseBroadcast(density, values, window), exchange(), seed=0)


class Clients:
    """What simulated clients hold, decoded from the parcels alone."""

    def __init__(self) -> None:
        self.models: dict[int, tuple[int, torch.Tensor]] = {}

    def receive(self, server: Published, client: int, held: Mask | None = None) -> int:
        parcel = server.parcel(client, held)
        version, before = self.models.get(client, (None, None))
        params, _ = received(parcel, before if version == parcel.base else None, server.exchange, held)
        self.models[client] = parcel.version, params
        server.learned(client)
        return len(parcel.data)


@pytest.mark.parametrize("values", ["float32", "int8", "bfloat16", "float32-zstd"])
@settings(max_examples=25, deadline=None)
@given(plan=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=2, max_size=7), window=st.integers(1, 4))
def test_whoever_takes_part_when_holds_the_published_model(values: str, plan: list[set[int]], window: int) -> None:
    server, clients = published(values, window=window), Clients()
    for version, cohort in enumerate(plan):
        server.publish(version, model(version), None)
        for client in sorted(cohort):
            clients.receive(server, client)
            held = clients.models[client][1].view(torch.int32)
            assert torch.equal(held, server.models[version].view(torch.int32))


def test_what_is_left_out_is_offered_again() -> None:
    server, target = published(density=0.1), model(1)
    server.publish(0, model(0), None)
    count = server.exchange.schema.prunable_size
    flat = server.exchange.schema.flat(target)
    gaps = []
    for version in range(1, 12):
        server.publish(version, target, None)
        gaps.append(float((flat - server.exchange.schema.flat(server.params))[:count].norm()))
    assert all(later < earlier for earlier, later in pairwise(gaps[:10]))
    assert gaps[-1] < 1e-5
    assert torch.allclose(flat[count:], server.exchange.schema.flat(server.params)[count:], atol=1e-6)


def test_a_change_is_small_an_absence_costs_more_and_a_failure_all() -> None:
    server, clients = published(density=0.05), Clients()
    server.publish(0, model(0), None)
    whole = clients.receive(server, 1)
    clients.receive(server, 2)
    clients.receive(server, 3)
    server.publish(1, model(1), None)
    change = clients.receive(server, 1)
    server.publish(2, model(2), None)
    server.forget(3)
    absent, failed = clients.receive(server, 2), clients.receive(server, 3)
    again = clients.receive(server, 2)
    assert again < change < absent < failed == whole


def test_a_client_that_does_not_hold_the_base_says_so() -> None:
    server, clients = published(), Clients()
    server.publish(0, model(0), None)
    clients.receive(server, 1)
    server.publish(1, model(1), None)
    with pytest.raises(ValueError, match="changes model 0, which this client does not hold"):
        received(server.parcel(1, None), None, server.exchange, None)


def test_a_new_mask_publishes_the_whole_model() -> None:
    server = published()
    schema = server.exchange.schema
    server.publish(0, model(0), None)
    server.learned(1)
    mask = schema.view_mask(torch.rand(schema.prunable_size) < 0.5)
    server.publish(1, model(1), mask)
    parcel = server.parcel(1, None)
    assert parcel.base is None
    params, told = received(parcel, None, server.exchange, None)
    assert told is not None
    assert torch.equal(schema.flat_mask(told), schema.flat_mask(mask))
    assert not params[: schema.prunable_size][~schema.flat_mask(mask)].any()


def test_full_density_in_float32_is_close_to_the_dense_federation(tmp_path: Path) -> None:
    dense = run_tiny(tmp_path / "d", "rounds=4")
    full = run_tiny(tmp_path / "f", "rounds=4", "wire.broadcast.density=1.0")
    for name, value in dense.params.items():
        assert torch.allclose(value, full.params[name], atol=1e-5), name


def test_the_ledger_books_what_a_sparse_broadcast_sends(tmp_path: Path) -> None:
    asked = ["rounds=6", "cohort.size=6", *SPARSE]
    report = run_tiny(tmp_path, *asked)
    table = report.ledger.to_table().to_pylist()
    down = [
        sum(r["payload_bytes"] for r in table if r["round"] == number and r["direction"] == "down")
        for number in range(1, 7)
    ]
    schema = exchange_of(tmp_path, asked)
    dense_part = sum(schema.section_bytes[kind] for kind in ("dense", "buffers"))
    assert down[0] > 6 * 4 * schema.prunable_size
    assert all(6 * dense_part < size < 6 * (dense_part + 0.18 * 4 * schema.prunable_size) for size in down[1:])
    assert report.summary["downlink_bytes"] == sum(down)


def exchange_of(out: Path, asked: list[str]) -> Schema:
    from fl_sim.federation import Federation

    return Federation.build(tiny(out, *asked)).exchange.schema


@pytest.mark.parametrize(
    "overrides",
    [
        ["client.target=clients.presets:topk", "client.density=0.1", "wire.error_feedback=true"],
        ["wire.broadcast.values=int8", "wire.uplink.values=int8", "wire.uplink.content=difference"],
        ["strategy.target=strategies.presets:gradual_magnitude", "strategy.density=0.2", "strategy.end=3"],
        ["strategy.target=strategies.presets:fedavg", "strategy.momentum=0.5", "evaluate.clients=2"],
        ["strategy.target=strategies.presets:rate_distortion", "strategy.density=0.3", "strategy.images=16"],
    ],
    ids=lambda o: " ".join(o),
)
def test_other_methods_compose(tmp_path: Path, overrides: list[str]) -> None:
    report = run_tiny(tmp_path, "rounds=5", "cohort.size=5", *SPARSE, *overrides)
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    assert report.rounds[-1]["accuracy"] > 0.3


def test_clients_that_only_evaluated_hold_what_they_were_sent(tmp_path: Path) -> None:
    asked = ["rounds=8", "data.clients=8", "cohort.size=3", "evaluate.clients=3", *SPARSE]
    report = run_tiny(tmp_path, *asked)
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}


def test_without_prunable_weights_all_is_published(tmp_path: Path) -> None:
    plain = run_tiny(tmp_path / "p", "model.trainable=batchnorm")
    sparse = run_tiny(tmp_path / "s", "model.trainable=batchnorm", *SPARSE)
    assert all(torch.allclose(plain.params[n], value, atol=1e-4) for n, value in sparse.params.items())


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wire.broadcast.density = 0.0: must be above 0"):
        tiny(tmp_path, "wire.broadcast.density=0.0")
    with pytest.raises(UserError, match="unknown values 'int3'"):
        tiny(tmp_path, "wire.broadcast.density=0.1", "wire.broadcast.values=int3")
