"""Gates on convolutions whose filters are computed from other tensors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from computed_weights import WAYS, chain
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fl_sim.core.types import UserError
from fl_sim.gating import gate
from fl_sim.gating.skipping import exported, folded, skipping
from fl_sim.models.parameters import load, snapshot

IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


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
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gated = gate(model, 1.0, "weight")
    assert not [
        one.message for one in said if one.category is not ResourceWarning
    ]  # any other test's garbage may say that
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


@pytest.mark.parametrize("salience", ["gate", "weight"])
@pytest.mark.parametrize("way", WAYS)
def test_skipping_is_the_gated_model(way: str, salience: str) -> None:
    model = chain(way, (0, 1, 2))
    model.train()(IMAGES)  # a model that a pass was made with, with a gradient
    gated = gate(model, 0.5, salience).eval()
    before = copy.deepcopy(gated.state_dict())
    with torch.no_grad():
        expected = gated(IMAGES)
        fast = skipping(gated)
        assert close(fast(IMAGES), expected)
        assert close(exported(fast, IMAGES[:1])(IMAGES[1:2]), expected[1:2])
        assert close(folded(model)(IMAGES), model.eval()(IMAGES))
    assert all(torch.equal(value, before[name]) for name, value in gated.state_dict().items())


def test_skipping_of_computed_biases_and_norms() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = chain()
    for layer, name in (("3", "bias"), ("4", "weight"), ("6", "bias")):
        parametrize.register_parametrization(model.get_submodule(layer), name, Doubled())
    prune.random_unstructured(model.get_submodule("7"), "bias", 0.5)
    gated = gate(model, 0.5).eval()
    with torch.no_grad():
        assert close(skipping(gated)(IMAGES), gated(IMAGES))


def test_skipping_refuses_a_weight_that_a_hook_of_ones_own_computes() -> None:
    class Halved:
        name = "weight"

        def __call__(self, layer: nn.Module, inputs: object) -> None:
            layer.weight = layer.get_parameter("whole") / 2

    model = chain()
    conv = model.get_submodule("3")
    conv.register_parameter("whole", conv._parameters.pop("weight"))
    conv.register_forward_pre_hook(Halved())
    model.eval()(IMAGES)
    with pytest.raises(UserError, match=r"net\.3\.weight: a hook of one's own computes it"):
        skipping(gate(model))
