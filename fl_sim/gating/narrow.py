"""The pieces of inference on one sample's channels alone: choosing, gathering, convolving, putting back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_sim.gating.gates import Gate
from fl_sim.gating.salience import SMALLEST, LearnedGate


def highest(scores: Tensor, keep: int) -> Tensor:
    """Indices (keep,) of the highest scores (C,); equal scores: lowest index first."""
    return scores.sort(descending=True, stable=True).indices[:keep]


def widen(values: Tensor, channels: Tensor, size: int) -> Tensor:
    """(1, k, ...) -> (1, size, ...): the values at their channels, zero elsewhere."""
    return values.new_zeros(1, size, *values.shape[2:]).index_copy_(1, channels, values)


def add_channels(dense: Tensor, values: Tensor, channels: Tensor) -> Tensor:
    """`dense` (1, C, ...) plus narrow values (1, k, ...) at their channels."""
    return dense.index_add(1, channels, values)


class Choice(nn.Module):
    """Channel choice for one sample: (input, its channels or None) -> (scores or None, channels), each (k,)."""

    filters: Tensor

    def __init__(self, gate: Gate, filters: Tensor) -> None:
        super().__init__()
        self.salience, self.keep = gate.salience, gate.kept
        self.register_buffer("filters", filters.detach().clone())

    def forward(self, x: Tensor, inputs: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """x: (1, C_in, H, W), or its channels `inputs` alone."""
        whole = x if inputs is None else widen(x, inputs, self.filters.shape[1])
        scores = self.salience(whole, whole, self.filters)[0]
        channels = highest(scores, self.keep)
        return (scores.index_select(0, channels) if self.salience.scales else None), channels


class LearnedChoice(nn.Module):
    """`Choice` for `LearnedGate` on inputs that are not negative, in few operations.

    Scores are `sigmoid(W s / mean(s) + b)` with s by channel sums, and W and b divided by the temperature; a further row of
    W holds the mean.
    """

    weight: Tensor
    bias: Tensor
    offset: Tensor
    ones: Tensor

    def __init__(self, salience: LearnedGate, keep: int) -> None:
        super().__init__()
        weight, bias = (p.detach() / salience.temperature for p in (salience.linear.weight, salience.linear.bias))
        mean = torch.full_like(weight[:1], 1 / weight.shape[1])
        self.keep, self.outputs = keep, len(weight)
        self.register_buffer("weight", torch.cat([weight, mean]))
        self.register_buffer("bias", bias.clone())
        self.register_buffer("offset", torch.cat([torch.zeros_like(bias), bias.new_full((1,), SMALLEST)]))
        self.register_buffer("ones", bias.new_ones(0), persistent=False)

    def forward(self, x: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Choice.forward`."""
        weight = self.weight if inputs is None else self.weight.index_select(1, inputs)
        flat = x.reshape(x.shape[1], -1)
        if len(self.ones) != flat.shape[1]:
            self.ones = flat.new_full((flat.shape[1],), 1.0)
        # A product with ones is a sum at a fraction of the overhead of a reduction.
        mapped = torch.addmv(self.offset, weight, flat.mv(self.ones))
        scores = torch.addcdiv(self.bias, mapped[: self.outputs], mapped[self.outputs]).sigmoid_()
        channels = highest(scores, self.keep)
        return scores.index_select(0, channels), channels


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv` with other filters."""
    # The public function does not know padding modes.
    result: Tensor = conv._conv_forward(x, weight, bias)
    return result


class NarrowConv(nn.Module):
    """A convolution whose input holds some channels only: the other columns of its filters are not needed."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        """x (1, k, H, W), the channels `inputs` (k,) -> the dense result."""
        return convolve(self.conv, x, self.conv.weight.index_select(1, inputs), self.conv.bias)


class SkippingConv(nn.Module):
    """Convolution, BatchNorm and gate for one sample: the chosen channels alone, `factor` times the scores.

    `conv` has BatchNorm folded in, and therefore a bias.
    """

    bias: Tensor

    def __init__(self, conv: nn.Conv2d, choice: nn.Module, factor: float) -> None:
        super().__init__()
        assert conv.bias is not None
        with torch.no_grad():
            conv.weight.mul_(factor)
            conv.bias.mul_(factor)
        self.conv, self.choice = conv, choice
        self.register_buffer("bias", conv.bias.detach())

    def forward(self, x: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (1, C_in, H, W), or its channels `inputs` alone -> (values (1, k, H', W'), their channels (k,))."""
        scores, channels = self.choice(x, inputs)
        columns = self.conv.weight if inputs is None else self.conv.weight.index_select(1, inputs)
        weight, bias = columns.index_select(0, channels), self.bias.index_select(0, channels)
        if scores is not None:
            weight, bias = weight.mul_(scores.view(-1, 1, 1, 1)), bias.mul_(scores)
        return convolve(self.conv, x, weight, bias), channels
