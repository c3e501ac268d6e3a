"""Models: exact counts, names, seeds, MACs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from unfilled import unfilled

from fl_sim import count_macs, evaluate, local_sgd
from fl_sim.core.types import UserError
from fl_sim.data import load
from fl_sim.models import MODELS, batchnorm_names, build, prunable_names


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
        ("wrn-16-8", 10_961_370, 10_954_160, 7_200),
        ("wrn-22-8", 17_158_106, 17_147_312, 10_784),
        ("wrn-28-8", 23_354_842, 23_340_464, 14_368),
        ("wrn-28-10", 36_479_194, 36_461_232, 17_952),
        ("vgg16", 14_728_266, 14_715_584, 8_448),
        ("densenet121", 6_956_426, 6_872_768, 83_648),
        ("mobilenet_v1", 3_217_226, 3_195_328, 21_888),
        ("fastgrnn", 15_052, 14_880, 0),
    ],
)
def test_counts(name: str, params: int, prunable: int | None, batchnorm: int) -> None:
    with unfilled():
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
    "name",
    [
        n
        for n in MODELS
        if n not in ("lstm", "transformer")  # of tokens: tests/models/test_sequence.py
        and n not in ("resnet110", "resnet218", "resnet434", "resnet866", "resnet50", "wrn-28-8", "wrn-28-10")
    ],
)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_models_take_the_data_they_are_built_for(name: str, channels: int, size: int) -> None:
    with unfilled():
        model = build(name, num_classes=7, in_channels=channels, image_size=size).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_torchvision_counts_and_stem() -> None:
    import torchvision.ops

    assert torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5).tolist() == [0]
    with unfilled():
        small, large = build("resnet18"), build("resnet18", image_size=224, num_classes=1000)
    assert count(small) == 11_173_962
    assert count(large) == 11_689_512
    assert small.conv1.stride == (1, 1)
    assert large.conv1.stride == (2, 2)


@pytest.mark.parametrize(
    ("name", "params"), [("vgg16", 138_365_992), ("densenet121", 7_978_856), ("mobilenet_v1", 4_231_976)]
)
def test_the_large_forms_have_the_published_counts(name: str, params: int) -> None:
    with torch.device("meta"):
        assert count(MODELS[name](num_classes=1000, in_channels=3, image_size=224)) == params


def test_a_wide_resnet_has_the_parameters_of_the_formula() -> None:
    def conv(a: int, b: int, size: int) -> int:
        return a * b * size * size

    widths = (16, 128, 256, 512)
    total = conv(3, 16, 3) + 2 * 512 + 512 * 10 + 10
    for before, after in pairwise(widths):
        total += conv(before, after, 1)
        for block in range(4):
            first = before if block == 0 else after
            total += 2 * first + conv(first, after, 3) + 2 * after + conv(after, after, 3)
    assert count(build("wrn-28-8")) == total


def test_fastgrnn_counts_each_step_and_reads_images_row_by_row() -> None:
    model = build("fastgrnn", in_channels=1, image_size=8).eval()
    assert prunable_names(model) == ["w.weight", "u.weight", "fc.weight"]
    assert count_macs(model, (1, 8, 8)) == 8 * (8 * 80 + 80 * 80) + 80 * 10
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(images), model(images[:, 0]))
    assert not torch.allclose(model(images), model(images.transpose(2, 3)))


def test_fastgrnn_learns_synthetic_sequences() -> None:
    from fl_sim.models.fastgrnn import FastGRNN

    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FastGRNN(3, 16, 2)
    # Which of two marks came first is in the order alone: a sum over the sequence does not tell.
    first = torch.randint(2, (256,), generator=rng)
    sequences = 0.1 * torch.randn(256, 12, 3, generator=rng)
    for i, swapped in enumerate(first.tolist()):
        sequences[i, 2, swapped] += 2
        sequences[i, 8, 1 - swapped] += 2
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(sequences[:192]), first[:192]).backward()
        optimizer.step()
    accuracy = (model(sequences[192:]).argmax(dim=1) == first[192:]).float().mean()
    assert float(accuracy) > 0.9


def test_fastgrnn_learns_the_digits_row_by_row() -> None:
    data = load("digits")
    model = build("fastgrnn", in_channels=1, image_size=8)
    rng = torch.Generator().manual_seed(0)
    local_sgd(model, data.train, lr=0.005, optimizer="adamw", epochs=4, batch_size=32, rng=rng)
    assert evaluate(model, data.validation)["accuracy"] > 0.7


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = build("resnet8", seed=1), build("resnet8", seed=1), build("resnet8", seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def own_images(num_classes: int, in_channels: int) -> nn.Module:
    """A builder for images that names neither their size nor a width."""
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def test_builders_for_images_get_the_arguments_that_they_name() -> None:
    model = build(f"{__name__}:own_images", num_classes=5, in_channels=1, image_size=8)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(UserError, match=r"model.width = 0.5: .* has one width"):
        build(f"{__name__}:own_images", width=0.5)


def test_width_and_unknown_names() -> None:
    assert build("resnet20", width=0.5).conv1.out_channels == 8
    with pytest.raises(UserError, match="did you mean 'resnet20'"):
        build("resnet_20")
    with pytest.raises(UserError, match="one width"):
        build("resnet18", width=0.5)
