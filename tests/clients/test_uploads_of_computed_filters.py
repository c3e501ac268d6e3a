"""Uploads of whole channels where filters are computed from other tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from computed_weights import WAYS, chain
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from clients.retention import RetainChannels, change_magnitude, rows, rows_and_columns
from fl_sim.core.types import Task
from fl_sim.data import load as load_data
from fl_sim.gating import gate
from fl_sim.models.parameters import load, snapshot
from fl_sim.training.client import ClientContext

DATA = load_data("digits").train.subset(range(16))
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def context(model: nn.Module) -> ClientContext:
    return ClientContext(model, DATA, torch.Generator())


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_filters_are_those_of_the_received_model(way: str) -> None:
    model = gate(chain(way), 0.5, "weight")
    received = Task(1, snapshot(model))
    with torch.no_grad():
        model.eval()(IMAGES)
        size = model.net.get_submodule("3").weight.abs().flatten(1).sum(dim=1)
    load(model, {name: value.flip(0) for name, value in received.params.items()})  # what training made of it
    torch.testing.assert_close(change_magnitude(received, context(model))["3"], size)


def normed(norm: Callable[..., nn.Module], dim: int | None) -> nn.Module:
    model = chain()
    norm(model.get_submodule("3"), dim=dim)
    return model


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
@pytest.mark.parametrize("extent", [rows, rows_and_columns])
def test_what_has_no_row_for_each_channel_belongs_to_none(norm, dim, extent) -> None:  # type: ignore[no-untyped-def]
    model = gate(normed(norm, dim), 0.5, "weight").train()
    model(IMAGES)
    task = Task(1, snapshot(model))
    kept = RetainChannels(0.5, extent=extent)(task, context(model))
    computed = [name for name in model.groups["3"] if name.startswith("net.3.") and "bias" not in name]
    assert len(computed) == (2 if dim == 0 else 1)
    for name in computed:
        assert kept[name].shape == task.params[name].shape
        assert int(kept[name].flatten(1).any(dim=1).sum()) == 8
