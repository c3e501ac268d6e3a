"""Gates on convolutions whose filters are computed from other tensors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from computed_weights import WAYS, chain
from torch import Tensor, nn

from fl_sim.gating import gate
from fl_sim.models.parameters import load, snapshot

IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def effective(conv: nn.Module, params: dict[str, Tensor], start: str) -> Tensor:
    """The filters that a convolution computes from these parameters, by the formulas of the papers."""
    own = {name.removeprefix(start): value for name, value in params.items() if name.startswith(start)}
    if "weight_mask" in dict(conv.named_buffers()):
        return own["weight_orig"] * conv.get_buffer("weight_mask")
    g, v = (own[name] for name in (("weight_g", "weight_v") if "weight_g" in own else GV))
    return g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


GV = ("parametrizations.weight.original0", "parametrizations.weight.original1")


@pytest.mark.parametrize("way", WAYS)
def test_gating_warns_of_nothing_and_leaves_the_tensors_as_they_were(way: str) -> None:
    model = chain(way)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated = gate(model, 1.0, "weight")
    after = gated.net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        assert torch.equal(gated.eval()(IMAGES), model.eval()(IMAGES))


@pytest.mark.parametrize("way", ["weight_norm", "weight_norm_old", "pruned"])
def test_gates_rank_the_filters_of_the_received_model(way: str) -> None:
    """Not those that the last forward pass computed, of another model."""
    gated = gate(chain(way), 0.5, "weight").eval()
    with torch.no_grad():
        gated(IMAGES)
    received = {name: value.flip(0) if name.startswith("net.3.") else value for name, value in snapshot(gated).items()}
    load(gated, received)
    with torch.no_grad():
        gated(IMAGES)
    size = effective(gated.net.get_submodule("3"), received, "net.3.").abs()
    scores = torch.where(size > 1e-3, size, 0.0).flatten(1).mean(dim=1)
    assert gated.masks()["3"][0].nonzero()[:, 0].tolist() == sorted(scores.topk(8).indices.tolist())
