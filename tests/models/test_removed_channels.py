"""Law of channel removal: in evaluation mode a model answers the same before and after, whatever reads the channel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disabled import interior, trained_like
from torch import Tensor, nn

from fl_sim import models
from fl_sim.models.channels import inner_channels, remove_disabled
from fl_sim.training import snapshot
from fl_sim.training.model_file import read_model, write_model


def net(*between: nn.Module, bias: bool, beta: float, behind: nn.Module | None = None) -> nn.Sequential:
    """Convolution, BatchNorm whose channel 0 is disabled, what lies between, a reader whose weights are 1."""
    made = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), *between, nn.Conv2d(2, 1, 1, bias=bias))
    if behind is not None:
        made.append(behind)
    norm, reader = made[1], made[2 + len(between)]
    with torch.no_grad():
        norm.weight[0] = 0.0
        norm.bias[:] = torch.tensor([beta, 0.5])
        reader.weight.fill_(1.0)
    return made.eval()


NETS: dict[str, Callable[[], nn.Sequential]] = {
    "reader without bias": lambda: net(nn.ReLU(), bias=False, beta=1.0),
    "reader with bias": lambda: net(nn.ReLU(), bias=True, beta=1.0),
    "linear bottleneck": lambda: net(bias=True, beta=-1.0),
    "linear bottleneck without bias": lambda: net(bias=False, beta=-1.0),
    "linear bottleneck, BatchNorm behind": lambda: net(bias=False, beta=-1.0, behind=nn.BatchNorm2d(1)),
    "negative beta, rectified": lambda: net(nn.ReLU(), bias=False, beta=-1.0),
    "batch statistics behind": lambda: net(
        nn.ReLU(), bias=False, beta=1.0, behind=nn.BatchNorm2d(1, track_running_stats=False)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_outputs_stay_equal(name: str) -> None:
    model = NETS[name]().double()  # a BatchNorm behind may enlarge the rounding of float32 beyond any tolerance
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    smaller = remove_disabled(model)
    assert smaller[0].out_channels == 1  # type: ignore[union-attr]
    with torch.inference_mode():
        assert torch.allclose(smaller(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_reader_gets_a_bias_only_where_there_is_something_to_add() -> None:
    assert remove_disabled(NETS["negative beta, rectified"]())[3].bias is None  # type: ignore[index]
    assert remove_disabled(NETS["reader without bias"]())[3].bias.tolist() == [1.0]  # type: ignore[index]


@pytest.mark.parametrize(("name", "places"), [("wrn-16-8", 6), ("densenet121", 58)])
def test_pre_activation_networks_keep_their_answers(name: str, places: int) -> None:
    model = trained_like(name, 8) if name == "densenet121" else _small_wide_resnet()
    smaller = remove_disabled(model)
    assert len(inner_channels(model)) == places
    size = 8 if name == "densenet121" else 16
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = interior(model, x)
    assert torch.allclose(interior(smaller, x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert sum(p.numel() for p in smaller.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


def _small_wide_resnet() -> nn.Module:
    return trained_like("wrn-16-8", 16, width=0.25)


def test_a_model_whose_readers_got_a_bias_comes_back_from_its_file(tmp_path: Path) -> None:
    smaller = remove_disabled(_small_wide_resnet())
    described = {"name": "wrn-16-8", "num_classes": 10, "in_channels": 3, "image_size": 16, "width": 0.25}
    write_model(tmp_path / "m.safetensors", snapshot(smaller), described)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(read_model(tmp_path / "m.safetensors")(x), smaller(x))


class Twice(nn.Module):
    """A convolution, or a BatchNorm, or a weight alone, that is used in two places."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.other = self.norm if what == "norm" else nn.BatchNorm2d(3)
        if what == "conv":
            self.second = self.first
        if what == "weight":
            self.second.weight = self.first.weight
        if what == "computed":
            nn.utils.parametrizations.weight_norm(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(torch.relu(self.norm(self.first(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", ["conv", "norm", "weight", "computed"])
def test_what_is_used_twice_or_computed_stays_whole(what: str) -> None:
    model = Twice(what).eval()
    with torch.no_grad():
        model.norm.weight[0] = 0.0
        model.norm.bias.fill_(1.0)
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(remove_disabled(model)(x), model(x), atol=1e-6)
    assert not inner_channels(model)


def test_a_norm_without_scale_is_no_place() -> None:
    assert not inner_channels(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 1, 1)))
    assert len(inner_channels(models.build("cnn_bn"))) == 2
