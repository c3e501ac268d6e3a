"""Channels that are off for a whole round, cut out before training: the result of masked training, from fewer channels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from federation import TINY, same, tiny
from gated import lively
from torch import Tensor, nn

from fl_sim import Experiment, run
from fl_sim.core.types import Mask, UserError
from fl_sim.data import load as load_data
from fl_sim.gating import Gated, gate
from fl_sim.gating.cut_places import places_of
from fl_sim.gating.cutting import submodel
from fl_sim.gating.graph import top_channels
from fl_sim.models import build
from fl_sim.training.loop import Training

DATA = load_data("digits").train.subset(range(48))
TRAINING = Training(lr=0.05, steps=3, batch_size=16, momentum=0.9)
CUT = Training(lr=0.05, steps=3, batch_size=16, momentum=0.9, cut_channels=True)


def resnet() -> nn.Module:
    return lively(build("resnet8", width=0.5, in_channels=1))


def plain() -> nn.Module:
    """Channels of every layer are read by the next one alone, so that its convolutions lose rows and columns."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 12), (12, 6)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return lively(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)))


class _Fixed(nn.Module):
    """A gate that multiplies by one mask, whatever comes."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        return z * self.mask.view(1, -1, 1, 1)


def largest(model: Gated) -> dict[str, Tensor]:
    """Gated convolution -> channels with the largest filters, counted without the gates' own code."""
    found = {}
    for conv, gate_ in model.gates.items():
        size = model.net.get_submodule(conv).weight.detach().abs()
        score = torch.where(size > 1e-3, size, 0.0).flatten(1).mean(dim=1)
        found[conv] = top_channels(score[None], gate_.kept)[0]
    return found


def trained(training: Training, model: nn.Module, mask: Mask | None = None) -> dict[str, Tensor]:
    training.fit(model, DATA, mask=mask, rng=torch.Generator().manual_seed(1))
    return {k: v for k, v in model.state_dict().items() if "num_batches" not in k}


@pytest.mark.parametrize("keep", [0.5, 0.25, {"*.conv1": 0.5}, {"layer1.0.conv2": 0.3}], ids=str)
@pytest.mark.parametrize("precision", ["float32", "channels_last"])
def test_gated_training_is_that_of_masked_channels(keep: float | dict[str, float], precision: str) -> None:
    model = gate(resnet(), keep, "weight")
    on = largest(model)
    masked, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for conv in on:
        masked.net.set_submodule(f"gates.{conv.replace('.', '_')}", _Fixed(on[conv]))
    settings = {"lr": 0.05, "steps": 3, "batch_size": 16, "momentum": 0.9, "precision": precision}
    cut, whole = trained(Training(**settings, cut_channels=True), model), trained(Training(**settings), masked)
    for name in cut:
        if "running" not in name:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)
    for conv, alive in on.items():
        norm = conv.replace("conv", "bn")
        for entry in (f"{conv}.weight", f"{norm}.weight", f"{norm}.running_mean"):
            assert torch.equal(cut[f"net.{entry}"][~alive], before[f"net.{entry}"][~alive])
            assert not torch.equal(cut[f"net.{entry}"][alive], before[f"net.{entry}"][alive])
        assert model.use()[conv].active.tolist() == alive.float().tolist()
        assert ((model.use()[conv].salience > 0) == alive).all()


@pytest.mark.parametrize("make", [resnet, plain])
def test_channels_that_a_pruning_mask_removes_are_cut_and_the_rest_is_masked(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    rng = torch.Generator().manual_seed(3)
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 4}
    mask = {name: torch.rand(p.shape, generator=rng) < 0.7 for name, p in weights.items()}
    dead = 0
    for place in places_of(model):
        gone = torch.rand(len(weights[f"{place.conv}.weight"]), generator=rng) < 0.5
        mask[f"{place.conv}.weight"][gone] = False
        mask[f"{place.readers[0]}.weight"][:, gone] = False
        dead += int(gone.sum())
    with submodel(copy.deepcopy(model), mask) as sub:
        assert sub is not None
        channels = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        assert sum(m.out_channels for m in sub.model.modules() if isinstance(m, nn.Conv2d)) == channels - dead
    cut, whole = trained(CUT, copy.deepcopy(model), mask), trained(TRAINING, copy.deepcopy(model), mask)
    for name in cut:
        if "running" not in name:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)
    assert all(not cut[name][~alive].any() for name, alive in mask.items())


def test_a_layer_that_the_mask_removes_whole_keeps_one_dead_channel() -> None:
    model = plain()
    first, second = (f"{path}.weight" for path in ("0", "3"))
    weights = dict(model.named_parameters())
    mask = {name: torch.zeros_like(weights[name], dtype=torch.bool) for name in (first, second)}
    with submodel(copy.deepcopy(model), mask) as sub:
        assert sub is not None
        assert sub.model.get_submodule("0").out_channels == 1
    cut, whole = trained(CUT, copy.deepcopy(model), mask), trained(TRAINING, copy.deepcopy(model), mask)
    for name in cut:
        if "running" not in name:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)


def test_dropout_draws_for_all_channels_so_that_a_cut_ends_before_it() -> None:
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)]
    layers += [nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)]
    model = gate(lively(nn.Sequential(*layers)), 0.5, "weight")
    assert [place.readers for place in places_of(model)] == [()]
    masked = copy.deepcopy(model)
    masked.net.set_submodule("gates.2", _Fixed(largest(model)["2"]))
    cut, whole = trained(CUT, model), trained(TRAINING, masked)
    for name in cut:
        if "running" not in name:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)


def test_a_smaller_model_that_was_used_before_holds_nothing_of_it() -> None:
    model = gate(resnet(), 0.5, "weight")
    first = {k: v.clone() for k, v in model.state_dict().items()}
    other = {k: v.flip(0) for k, v in first.items()}  # other channels are the largest ones
    model.load_state_dict(other)
    trained(CUT, model)
    for keep in (0.25, 0.5):
        model.load_state_dict(first)
        model.set_keep(keep)
        again = trained(CUT, model)
        fresh = gate(resnet(), keep, "weight")
        fresh.load_state_dict(first)
        assert all(torch.equal(again[name], value) for name, value in trained(CUT, fresh).items())


def test_with_every_channel_on_training_is_the_usual_one() -> None:
    model = gate(resnet(), 1.0, "weight")
    with submodel(model) as sub:
        assert sub is None
    whole = trained(TRAINING, copy.deepcopy(model))
    assert all(torch.equal(value, whole[name]) for name, value in trained(CUT, model).items())


def test_bad_input_is_one_line_before_round_1(tmp_path: Path) -> None:
    cases = {
        ("gating.keep=0.5",): "the gates choose channels for each sample; it takes gating.salience = 'weight'",
        (
            "gating.salience=weight",
            "gating.masking=backward_only",
        ): "takes gating.salience = 'weight' and gating.masking = 'both_ways'",
        ("model.name=mlp",): "has no channels between a convolution with BatchNorm",
        ("client.target=clients.presets:fedprox",): "the loss of this client compares weights or layers",
        ('model.adapter={train = "head"}',): "not with model.adapter",
    }
    for overrides, said in cases.items():
        with pytest.raises(UserError, match=r"training\.cut_channels") as caught:
            run(tiny(tmp_path, "training.cut_channels=true", *overrides))
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/rounds.jsonl"))


def test_a_federation_ends_in_the_same_bits_on_other_engines(tmp_path: Path) -> None:
    tree = {**TINY, "model": {"name": "resnet8", "width": 0.25}, "client": "clients.presets:adaptive_pruning"}
    keys = ["gating.salience=weight", "gating.keep=0.5", "training.cut_channels=true", "training.steps=2"]
    reports = [
        run(Experiment.from_tree(tree, [f'out="{tmp_path / engine}"', f"engine={engine}", "workers.count=2", *keys]))
        for engine in ("inline", "workers", "cohort")
    ]
    same(*reports[:2])
    same(*reports[1:])


def test_a_model_without_gates_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ["training.cut_channels=true", "training.steps=1", "rounds=1"]
    model = {"name": "resnet8", "width": 0.25}
    run(Experiment.from_tree({**TINY, "model": model}, [f'out="{tmp_path}"', *keys]))
    assert "only channels are cut that a pruning mask removes whole" in caplog.text
