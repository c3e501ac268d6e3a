"""MACs of gated models that run more than convolutions and linear layers on vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fl_sim import count_macs
from fl_sim.gating import gate
from fl_sim.gating.plan import ratio_within

SHAPE = (3, 8, 8)
STEM = 8 * 3 * 9 * 64, 16 * 8 * 9 * 64
"""MACs of the stem's convolutions, 8 and 16 filters over 8 x 8 places."""


class Stem(nn.Module):
    """Two convolutions with BatchNorm, of which gates can be behind both, and what `after` makes of their maps."""

    def __init__(self) -> None:
        super().__init__()
        layers = (self.block(3, 8), self.block(8, 16))
        self.stem = nn.Sequential(*(layer for block in layers for layer in block))

    def block(self, inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.stem(x))

    def after(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Recurrent(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(128, 20, bidirectional=True, batch_first=True), nn.Linear(40, 10)

    def after(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.permute(0, 3, 1, 2).flatten(2))[0].mean(1))


class Attends(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.out = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), nn.Linear(16, 10)

    def after(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x.flatten(2).transpose(1, 2)).mean(1))


class ChannelsLast(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(16, 64), nn.Linear(64, 10)

    def after(self, x: Tensor) -> Tensor:
        return self.out(self.up(x.permute(0, 2, 3, 1)).relu().mean((1, 2)))


class AcrossColumns(Stem):
    """Its linear layer reads the columns of a map, not the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.across, self.out = nn.Linear(8, 8), nn.Linear(16, 10)

    def after(self, x: Tensor) -> Tensor:
        return self.out(self.across(x).mean((2, 3)))


class Upsamples(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.ConvTranspose2d(16, 4, 2, stride=2), nn.Conv1d(4, 10, 1)

    def after(self, x: Tensor) -> Tensor:
        return self.out(self.up(x).flatten(2)).mean(2)


BEHIND: dict[Callable[[], Stem], int] = {
    Recurrent: 8 * 2 * 3 * 20 * (128 + 20) + 40 * 10,
    Attends: 64 * (4 * 16 * 16 + 2 * 16 * 64) + 2 * 64 * 64 * 16 + 16 * 10,
    ChannelsLast: 64 * 16 * 64 + 64 * 10,
    AcrossColumns: 16 * 8 * 8 * 8 + 16 * 10,
    Upsamples: 16 * 4 * 4 * 64 + 256 * 4 * 10,
}
"""Model -> MACs behind its stem, by hand."""


@pytest.mark.parametrize("make", BEHIND)
@pytest.mark.parametrize("salience", ["weight", "gate"])
def test_what_a_gate_does_not_touch_is_counted_whole(make: Callable[[], Stem], salience: str) -> None:
    model, x = make().eval(), torch.randn(2, *SHAPE)
    first, second = STEM
    whole = first + second + BEHIND[make]
    assert count_macs(model, SHAPE) == whole
    assert gate(model, 1.0, salience).count_macs(x).tolist() == [whole] * 2
    half = gate(model, 0.5, salience)
    assert list(half.gates) == ["stem.3"]
    assert half.count_macs(x).tolist() == [whole - second // 2] * 2


@pytest.mark.parametrize(
    ("make", "budget"), [(Recurrent, 0.8), (Attends, 0.93), (ChannelsLast, 0.8), (Upsamples, 0.75)]
)
def test_a_budget_is_a_share_of_all_macs(make: Callable[[], Stem], budget: float) -> None:
    ratio = ratio_within(gate(make().eval(), 1.0, "weight"), SHAPE, budget)
    whole = sum(STEM) + BEHIND[make]
    one = STEM[1] / 16 / whole
    kept = round(16 * ratio)
    assert 1 <= kept < 16
    assert 1 - (16 - kept) * one <= budget < 1 - (15 - kept) * one
