"""Structural pruning of channels that BatchNorm has disabled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from disabled import interior, trained_like

from fl_sim import models
from fl_sim.models.channels import inner_channels, remove_disabled
from fl_sim.models.macs import count_macs
from fl_sim.training import snapshot
from fl_sim.training.model_file import read_model, write_model


@pytest.mark.parametrize("name", ["resnet14", "resnet18", "resnet50", "cnn_bn"])
def test_removal_is_exact_but_for_zero_padding(name: str) -> None:
    model = trained_like(name)
    smaller = remove_disabled(model)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = interior(model, x)
    assert torch.allclose(interior(smaller, x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert sum(p.numel() for p in smaller.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    assert count_macs(smaller, (3, 16, 16)) < 0.9 * count_macs(model, (3, 16, 16))


def test_where_channels_can_go() -> None:
    assert [inner.norm for inner in inner_channels(models.build("resnet8"))] == [
        "layer1.0.bn1",
        "layer2.0.bn1",
        "layer3.0.bn1",
    ]
    assert len(inner_channels(models.build("resnet50"))) == 32
    assert [inner.norm for inner in inner_channels(models.build("cnn_bn"))] == ["1", "4"]


def test_nothing_goes_where_nothing_is_disabled_and_the_strongest_stays() -> None:
    model = models.build("resnet14")
    same = remove_disabled(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    with torch.no_grad():
        model.layer1[0].bn1.weight.fill_(0.0)
        model.layer1[0].bn1.weight[5] = 0.001
    smaller = remove_disabled(model)
    assert smaller.layer1[0].conv1.weight.shape == (1, 16, 3, 3)
    assert torch.equal(smaller.layer1[0].conv1.weight[0], model.layer1[0].conv1.weight[5])


def test_a_smaller_model_comes_back_from_its_file(tmp_path: Path) -> None:
    smaller = remove_disabled(trained_like("resnet14", 8))
    described = {"name": "resnet14", "num_classes": 10, "in_channels": 3, "image_size": 8}
    write_model(tmp_path / "m.safetensors", snapshot(smaller), described)
    again = read_model(tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(again(x), smaller(x))
