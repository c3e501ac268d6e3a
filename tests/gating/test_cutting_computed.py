"""Cutting channels beside layers whose weights, biases or norms are computed from other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from computed_weights import WAYS, chain
from federation import tiny
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fl_sim import run
from fl_sim.core.types import UserError
from fl_sim.data import load as load_data
from fl_sim.gating import Gated, gate
from fl_sim.gating.cut_places import places_of
from fl_sim.gating.cutting import submodel
from fl_sim.gating.graph import top_channels
from fl_sim.models.channels import remove_disabled
from fl_sim.training.loop import Training

DATA = load_data("digits").train.subset(range(48))
TRAINING = {"lr": 0.05, "steps": 3, "batch_size": 16, "momentum": 0.9}
KEEP = {"3": 0.5}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Fixed(nn.Module):
    """A gate that multiplies by one mask, whatever comes."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        return z * self.mask.view(1, -1, 1, 1)


def trained(model: nn.Module, *, cut: bool) -> dict[str, Tensor]:
    Training(**TRAINING, cut_channels=cut).fit(model, DATA, rng=torch.Generator().manual_seed(1))
    return {name: value for name, value in model.state_dict().items() if "num_batches" not in name}


@pytest.mark.parametrize("way", WAYS)
def test_a_gated_layer_whose_filters_are_computed_is_refused_by_its_name(way: str) -> None:
    with pytest.raises(UserError, match=r"training\.cut_channels: 3\.weight is computed") as caught:
        places_of(gate(chain(way), 0.5, "weight"))
    assert "allowed: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("layer", "name"), [("3", "bias"), ("4", "weight"), ("4", "bias")])
def test_computed_biases_and_norms_are_refused_too(layer: str, name: str) -> None:
    changes: list[Callable[[nn.Module], object]] = [
        lambda changed: parametrize.register_parametrization(changed, name, Doubled()),
        lambda changed: prune.random_unstructured(changed, name, 0.5),
    ]
    for change in changes:
        model = chain()
        change(model.get_submodule(layer))
        with pytest.raises(UserError, match=rf"training\.cut_channels: {layer}\.{name} is computed"):
            places_of(gate(model, KEEP, "weight"))


@pytest.mark.parametrize("way", WAYS)
def test_before_a_reader_that_computes_its_weight_training_is_that_of_masked_channels(way: str) -> None:
    """The cut ends at the gate: the reader's weight keeps all columns."""
    model = gate(chain(way, (2,)), KEEP, "weight")
    assert isinstance(model, Gated)
    assert [place.readers for place in places_of(model)] == [()]
    size = model.net.get_submodule("3").weight.detach().abs()
    on = top_channels(torch.where(size > 1e-3, size, 0.0).flatten(1).mean(dim=1)[None], 8)[0]
    masked = copy.deepcopy(model)
    masked.net.set_submodule("gates.3", Fixed(on))
    with submodel(copy.deepcopy(model)) as sub:
        assert sub is not None
        assert sub.model.get_submodule("net.3").out_channels == 8
    cut, whole = trained(model, cut=True), trained(masked, cut=False)
    for name in cut:
        if "running" not in name:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["weight_norm", "pruned"])
def test_other_layers_are_cut_where_the_table_of_ratios_leaves_these_out(way: str) -> None:
    assert [place.conv for place in places_of(gate(chain(way, (0, 3)), KEEP, "weight"))] == ["net.3"]


@pytest.mark.parametrize(("layer", "name"), [("3", "weight"), ("3", "bias"), ("4", "weight"), ("6", "weight")])
def test_without_gates_a_mask_cuts_no_such_place(layer: str, name: str) -> None:
    model = chain()
    parametrize.register_parametrization(model.get_submodule(layer), name, Doubled())
    assert "3" not in [place.conv for place in places_of(model)]
    before = model.eval()(torch.ones(1, 1, 8, 8))
    model.get_submodule("4").requires_grad_(False)
    torch.testing.assert_close(remove_disabled(model, 0.0).eval()(torch.ones(1, 1, 8, 8)), before)
    assert remove_disabled(model, 9.0).get_submodule("3").out_channels == 16


def test_a_run_is_refused_before_round_1(tmp_path: Path) -> None:
    keys = ["gating.salience=weight", "gating.keep=0.5", "training.cut_channels=true"]
    for built in ("pruned", "normed"):
        with pytest.raises(UserError, match=r"training\.cut_channels: 3\.weight is computed"):
            run(tiny(tmp_path, f"model.name=computed_weights:build_{built}", *keys))
    assert not list(tmp_path.glob("*/rounds.jsonl"))
