"""The sparse downlink: every client ends up with the published model bit for bit, and nothing is lost, only late."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from federation import WHOLE, run_tiny, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.communication.exchange import Exchange
from fl_sim.communication.sparse_broadcast import SparseBroadcast, join_framed, received, split_framed
from fl_sim.communication.task_header import BroadcastHeader
from fl_sim.core.types import FlatParams, Mask, UserError
from strategies.published_model import SparseBroadcastServer

SHAPES = {"conv": (8, 4, 3, 3), "fc": (10, 7), "bias": (10,), "bn.running_mean": (8,), "bn.running_var": (8,)}
SPARSE = ["wire.broadcast.density=0.1"]


def model(seed: int) -> FlatParams:
    generator = torch.Generator().manual_seed(seed)
    return FlatParams.pack({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def exchange() -> Exchange:
    return Exchange(Schema.of(model(0), ["conv", "fc"]))


def published(values: str = "float32", density: float = 0.2) -> SparseBroadcastServer:
    shared = exchange()
    return SparseBroadcastServer(SparseBroadcast(density, values), shared, seed=0, model=shared.schema.flat(model(0)))


class Clients:
    """What simulated clients hold, decoded from the messages alone; at first the seeded model and no mask."""

    def __init__(self) -> None:
        self.models: dict[int, tuple[int, torch.Tensor]] = {}
        self.masks: dict[int, Mask] = {}

    def receive(self, server: SparseBroadcastServer, client: int) -> int:
        schema, held = server.exchange.schema, self.masks.get(client)
        sent = server.encoded(client, held)
        assert sum(sent.described(schema, held).sections.values()) == len(sent.data)
        assert sent.header is not None
        version, before = self.models.get(client, (0, schema.flat(model(0))))
        base = before if version == sent.header.base else None
        params, mask = received(sent.data, sent.header, base, server.exchange, held)
        self.models[client] = sent.header.version, params
        if mask is not None:
            self.masks[client] = mask
        server.learned(client, server.version)
        return len(sent.data)


def decoded(server: SparseBroadcastServer, before: torch.Tensor | None) -> None:
    """Client 1 decodes what it is sent, starting from this model."""
    sent = server.encoded(1, None)
    assert sent.header is not None
    received(sent.data, sent.header, before, server.exchange, None)


def masked(version: int, masks: bool) -> tuple[FlatParams, Mask | None]:
    """A model and, where asked for, a mask of its own for it, which it respects."""
    schema, params = exchange().schema, model(version)
    if not masks:
        return params, None
    flat = schema.flat(params).clone()
    alive = torch.rand(schema.prunable_size, generator=torch.Generator().manual_seed(version)) < 0.5
    flat[: schema.prunable_size][~alive] = 0.0
    return schema.view(flat), schema.view_mask(alive)


@pytest.mark.parametrize("values", ["float32", "int8", "bfloat16", "float32-zstd"])
@settings(max_examples=examples(25), deadline=None)
@given(
    plan=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=2, max_size=7),
    lost=st.sets(st.tuples(st.integers(0, 6), st.integers(0, 4))),
    first_mask=st.integers(0, 8),
    density=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_whoever_takes_part_when_holds_the_published_model(
    values: str, plan: list[set[int]], lost: set[tuple[int, int]], first_mask: int, density: float
) -> None:
    server, clients = published(values, density), Clients()
    count = server.exchange.schema.prunable_size
    for rounds, cohort in enumerate(plan):
        params, mask = masked(rounds, rounds >= first_mask)
        server.publish(rounds, params, mask)
        for client in sorted(cohort):
            clients.receive(server, client)
            held = clients.models[client][1].view(torch.int32)
            assert torch.equal(held, server.model.view(torch.int32))
            assert torch.equal(held[count:], server.exchange.schema.flat(params)[count:].view(torch.int32))
            if mask is not None:
                flat = server.exchange.schema.flat_mask
                assert torch.equal(flat(clients.masks[client]), flat(mask))
                assert not held[:count][~flat(mask)].any()
            if (rounds, client) in lost:
                server.forget(client)


def test_what_is_left_out_is_offered_again() -> None:
    server, target = published(density=0.1), model(1)
    server.publish(0, model(0), None)
    count = server.exchange.schema.prunable_size
    flat = server.exchange.schema.flat(target)
    gaps = []
    for rounds in range(1, 12):
        server.publish(rounds, target, None)
        gaps.append(float((flat - server.model)[:count].norm()))
    assert all(later < earlier for earlier, later in pairwise(gaps[:10]))
    assert gaps[-1] < 1e-5
    assert torch.equal(flat[count:], server.model[count:])


def test_the_first_model_costs_nothing_an_absence_its_changes_and_a_failure_all() -> None:
    server, clients = published(density=0.05), Clients()
    server.publish(0, model(0), None)
    schema = server.exchange.schema
    first = clients.receive(server, 1)
    assert first < schema.section_bytes["dense"] + schema.section_bytes["buffers"] + 80
    clients.receive(server, 2)
    server.publish(1, model(1), None)
    change = clients.receive(server, 1)
    server.publish(2, model(2), None)
    server.forget(3)
    absent, newcomer, failed = (clients.receive(server, client) for client in (2, 4, 3))
    again = clients.receive(server, 2)
    assert again == first < change < absent == newcomer < 2 * change < failed
    assert failed > 4 * schema.prunable_size


def test_changes_are_forgotten_once_the_whole_model_is_smaller() -> None:
    server, clients = published(density=0.3), Clients()
    for rounds in range(12):
        server.publish(rounds, model(rounds), None)
        assert sum(len(delta.data) for delta in server.deltas.values()) <= 4 * server.exchange.schema.prunable_size
    header = server.encoded(1, None).header
    assert header is not None
    assert header.base is None
    assert clients.receive(server, 1) < 4 * server.exchange.schema.size + 80


def test_a_client_that_does_not_hold_the_base_says_so() -> None:
    server, clients = published(), Clients()
    for rounds in (0, 1, 2):
        server.publish(rounds, model(rounds), None)
        clients.receive(server, 1)
    server.publish(3, model(3), None)
    with pytest.raises(ValueError, match="changes model 2, which this client does not hold"):
        decoded(server, None)


def test_another_seeded_model_is_noticed() -> None:
    server = published()
    server.publish(0, model(0), None)
    other = server.exchange.schema.flat(model(9))
    with pytest.raises(ValueError, match="the seeded model made here is not the server's"):
        decoded(server, other)


def test_a_new_mask_is_a_change_of_what_it_leaves_alive() -> None:
    server, clients = published("int8", density=0.05), Clients()
    server.publish(0, model(0), None)
    clients.receive(server, 1)
    params, mask = masked(1, masks=True)
    server.publish(1, params, mask)
    size = clients.receive(server, 1)
    assert mask is not None
    schema = server.exchange.schema
    assert torch.equal(schema.flat_mask(clients.masks[1]), schema.flat_mask(mask))
    assert not clients.models[1][1][: schema.prunable_size][~schema.flat_mask(mask)].any()
    assert size < schema.prunable_size + schema.section_bytes["dense"] + schema.section_bytes["buffers"] + 80


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_several_payloads_travel_as_one(payloads: list[bytes]) -> None:
    assert [bytes(part) for part in split_framed(join_framed(payloads))] == payloads


@settings(max_examples=examples(200))
@given(st.binary(max_size=60), st.binary(max_size=3))
def test_damaged_changes_are_refused(data: bytes, masks: bytes) -> None:
    server = published()
    header = BroadcastHeader(1, 0, server.rule.coding.content, masks)
    with pytest.raises(CorruptPayload):
        received(data, header, server.model, server.exchange, None)


def test_what_is_kept_brings_everything_back() -> None:
    server = published("int8")
    for rounds in range(4):
        server.publish(rounds, *masked(rounds, masks=rounds == 2 or rounds == 3))
        server.learned(rounds, server.version)
    server.forget(1)
    again = published("int8")
    again.restore(server.kept(), server.client_versions)
    for client in range(6):
        restored, kept = again.encoded(client, None), server.encoded(client, None)
        assert (restored.data, restored.header) == (kept.data, kept.header)
    for each in (server, again):
        each.publish(4, *masked(4, masks=False))
    assert torch.equal(again.model, server.model)


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
    assert down[0] < 6 * (dense_part + 80)
    assert all(size < 6 * (dense_part + 0.18 * 4 * schema.prunable_size) for size in down[1:])
    assert report.summary["downlink_bytes"] == sum(down)


def exchange_of(out: Path, asked: list[str]) -> Schema:
    from fl_sim.simulation.federation import Federation

    return Federation.build(tiny(out, *asked)).first.exchange.schema


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
    report = run_tiny(
        tmp_path, *WHOLE, "rounds=5", "cohort.size=5", "training.batch_size=32", "training.steps=3", *SPARSE, *overrides
    )
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
