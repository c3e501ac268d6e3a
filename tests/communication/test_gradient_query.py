"""Questions for gradients: what is asked travels in the header, what is answered is a payload of the largest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import FOUR, tiny
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.communication import gradient_query
from fl_sim.communication import messages as wire
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.task_header import CurveRequest, GradientRequest, TaskHeader
from fl_sim.core.seeding import Purpose
from fl_sim.core.types import Task
from fl_sim.simulation.engines import open_grid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.server import build_server
from fl_sim.training import load
from fl_sim.training.losses import cross_entropy
from strategies.queries import Query
from strategies.sparse_server import SparseServer

SHAPES = {"a": (3, 4), "b": (2, 5)}


@given(seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), masked=st.booleans())
@settings(deadline=None, max_examples=examples(40))
def test_the_largest_gradients_of_pruned_weights_arrive(seed: int, share: float, masked: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    gradients = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    alive = {n: torch.rand(s, generator=rng) < 0.4 for n, s in SHAPES.items()} if masked else None
    schema = Schema.of(gradients, list(gradients))
    data = gradient_query.encode_gradients(gradients, share, alive, schema)
    got = schema.flat(gradient_query.decode_gradients(data, schema)).numpy()
    flat = schema.flat(gradients).numpy()
    dead = np.flatnonzero(~schema.flat_mask(alive).numpy()) if alive is not None else np.arange(len(flat))
    kept = dead[np.argsort(-np.abs(flat[dead]), kind="stable")[: round(share * len(dead))]]
    expected = flat if share == 1 else np.where(np.isin(np.arange(len(flat)), kept), flat, 0.0)
    assert np.array_equal(got, expected)


def test_the_answer_is_the_gradient_of_the_clients_own_samples(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, *FOUR, "model.name=mlp")
    federation, ledger = Federation.build(experiment), Ledger()
    server = build_server(federation, ledger).models[0]
    assert isinstance(server, SparseServer)
    with open_grid(federation) as grid:
        answers = Query(grid, server.receiver, server.round_log).gradients(server.state, 1.0)
    cohort = server.cohorts.draw(0, Purpose.CALIBRATION, 4, np.arange(6))
    model = load(federation.first.model, server.params)
    for client, (told, count) in zip(cohort, answers, strict=True):
        own = federation.data.train.subset(federation.partitions[client])
        assert count == len(own)
        model.zero_grad()
        cross_entropy(model, next(iter(own.batches(1000)))).backward()
        for name, value in told.items():
            assert torch.allclose(value, dict(model.named_parameters())[name].grad, atol=1e-5)  # type: ignore[arg-type]
    asked = ledger.total(by=("direction", "section"), where={"phase": "query"})
    size = federation.first.exchange.schema.prunable_size
    assert asked["up", "values"] == asked["down", "values"] == 4 * 4 * size


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), 1, "all"])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(CorruptPayload, match=r"gradient-share|a share of"):
        TaskHeader.read({"round": 1, "seed": 0, "gradient-share": share})


@pytest.mark.parametrize("request_", [None, GradientRequest(0.25), CurveRequest(3, "mean", 8, 4)])
def test_a_header_is_read_as_it_was_written(request_: GradientRequest | CurveRequest | None) -> None:
    header = TaskHeader(3, 7, request=request_)
    assert TaskHeader.read(header.scalars()) == header


@pytest.mark.parametrize("request_", [None, CurveRequest(3, "mean", 8, 4)])
def test_a_query_for_gradients_whose_header_asks_for_none_is_an_error_reply(
    tmp_path: Path, request_: CurveRequest | None
) -> None:
    federation = Federation.build(tiny(tmp_path))
    first, task = federation.first, Task(1, federation.first.initial)
    data = first.exchange.encode_down(task, first.initial, held_mask=None, seed=0)
    with open_grid(federation) as grid:
        content = wire.task_content(task, data, request=request_)
        (reply,) = grid.send_and_receive([Message(content, next(iter(grid.get_node_ids())), "query.gradients")])
    assert "a query for gradients whose header asks for none" in reply.error.reason
