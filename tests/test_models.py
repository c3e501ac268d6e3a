"""Models: exact counts, names, seeds, MACs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fl_sim import count_macs
from fl_sim.models import MODELS, batchnorm_names, build, prunable_names
from fl_sim.types import UserError


def count(model: nn.Module, names: list[str] | None = None) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if names is None or n in names)


@pytest.mark.parametrize(
    ("name", "params", "prunable", "batchnorm"),
    [
        ("cnn", 1_626_442, None, 0),
        ("resnet14", 175_258, 174_128, 1_120),
        ("resnet20", 272_474, 270_896, 1_568),
        ("resnet32", 466_906, 464_432, 2_464),
        ("resnet56", 855_770, 851_504, 4_256),
        ("resnet110", 1_730_714, 1_722_416, 8_288),
    ],
)
def test_counts(name: str, params: int, prunable: int | None, batchnorm: int) -> None:
    model = build(name)
    assert count(model) == params
    assert count(model, batchnorm_names(model)) == batchnorm
    if prunable is not None:
        assert count(model, prunable_names(model)) == prunable


@pytest.mark.parametrize(("name", "macs"), [("resnet20", 40.81e6), ("resnet32", 69.13e6)])
def test_macs_of_cifar_resnets(name: str, macs: float) -> None:
    assert count_macs(build(name), (3, 32, 32)) == pytest.approx(macs, rel=2e-3)


def test_macs_equal_a_brute_force_count_and_follow_the_mask() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 16, 5))
    assert count_macs(model, (3, 8, 8)) == 4 * 4 * (4 * 3 * 9) + 64 * 5
    mask = {n: torch.zeros_like(dict(model.named_parameters())[n], dtype=torch.bool) for n in ("0.weight", "2.weight")}
    mask["0.weight"][0, 0, 0, :2] = True
    mask["2.weight"][3] = True
    assert count_macs(model, (3, 8, 8), mask=mask) == 16 * 2 + 64
    assert model.training


@pytest.mark.parametrize(
    "name", [n for n in MODELS if n not in ("resnet110", "resnet218", "resnet434", "resnet866", "resnet50")]
)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_models_take_the_data_they_are_built_for(name: str, channels: int, size: int) -> None:
    model = build(name, num_classes=7, in_channels=channels, image_size=size).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_torchvision_counts_and_stem() -> None:
    import torchvision.ops

    assert torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5).tolist() == [0]
    small, large = build("resnet18"), build("resnet18", image_size=224, num_classes=1000)
    assert count(small) == 11_173_962
    assert count(large) == 11_689_512
    assert small.conv1.stride == (1, 1)
    assert large.conv1.stride == (2, 2)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = build("resnet8", seed=1), build("resnet8", seed=1), build("resnet8", seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_width_and_unknown_names() -> None:
    assert build("resnet20", width=0.5).conv1.out_channels == 8
    with pytest.raises(UserError, match="did you mean 'resnet20'"):
        build("resnet_20")
    with pytest.raises(UserError, match="one width"):
        build("resnet18", width=0.5)
