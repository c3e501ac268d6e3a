"""Saliences: what a channel is worth for a sample, as modules `(input, normalised output, filters) -> scores`.

Only a *predictive* salience knows a channel's score before the convolution runs, so that its gate can skip the
convolution it guards. With keep ratio r on both sides of a convolution:

| salience     | looks at                      | its own convolution | the next one | parameters |
|--------------|-------------------------------|---------------------|--------------|------------|
| `gate`       | the convolution's input       | saves 1 - r         | saves 1 - r  | C_in C_out + C_out |
| `gate_relu`  | the convolution's input       | saves 1 - r         | saves 1 - r  | C_in C_out + C_out |
| `weight`     | the filters, no sample        | saves 1 - r         | saves 1 - r  | none |
| `activation` | the convolution's own output  | saves nothing       | saves 1 - r  | none |
| `taylor`     | output and its gradient       | saves nothing       | saves nothing: only gradients are masked | none |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALLEST = 1e-12


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


class LearnedGate(nn.Module):
    """`g = 2 sigmoid((W s / mean(s) + b) / T)` with `s_c` the mean absolute value of input channel c (`gate`).

    The form of FBS (Gao et al., ICLR 2019, arXiv 1810.05331) with two deviations, both against divergence: the features
    are scale-free, so that activations and gates cannot feed each other, and the gate is bounded by 2. All parameters
    zero is the unit gate. Scores multiply their channels, through which W and b learn.

    Attributes:
        temperature: T above 0. Above 1 the factors of the channels that are on are nearer to 1 and learn more slowly, below
            1 they are nearer to 0 and 2. It changes no order of the channels, and so no choice of a gate that has not learned.
    """

    predictive, scales = True, True
    temperature = 1.0

    def __init__(self, conv: nn.Conv2d, rng: torch.Generator) -> None:
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, conv.in_channels, conv.out_channels)
        with torch.no_grad():
            self.linear.weight.normal_(std=conv.in_channels**-0.5, generator=rng)
            # At equal features every gate is 1: the first choice follows the sample, not the draw of W alone.
            self.linear.bias.copy_(-self.linear.weight.sum(dim=1))

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        """Scores (B, C_out) in 0..2."""
        # The sum of absolute values serves as well as the mean: the division removes any factor.
        s = torch.linalg.vector_norm(x, 1, dim=_spatial(x))
        logits = self.linear(s / s.mean(dim=1, keepdim=True).clamp_min(SMALLEST))
        return 2 * torch.sigmoid(logits if self.temperature == 1 else logits / self.temperature)


class PublishedGate(nn.Module):
    """`g = ReLU(W s + b)` with `s` the pooled input, W Kaiming-normal and b = 1 (`gate_relu`).

    The gate of the authors' first code (arXiv 2106.06921). In residual networks it *diverges* within a few steps: the
    gate multiplies the stream that it is computed from. Kept to reproduce, not to use.
    """

    predictive, scales = True, True

    def __init__(self, conv: nn.Conv2d, rng: torch.Generator) -> None:
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, conv.in_channels, conv.out_channels)
        with torch.no_grad():
            self.linear.weight.normal_(std=(2 / conv.in_channels) ** 0.5, generator=rng)
            self.linear.bias.fill_(1.0)

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        """Scores (B, C_out), not negative, unbounded."""
        return torch.relu(self.linear(x.mean(dim=_spatial(x))))


class Activation(nn.Module):
    """Mean absolute value of the normalised output channel; no parameters (`activation`)."""

    predictive, scales = False, False

    def __init__(self, conv: nn.Conv2d, rng: torch.Generator) -> None:
        super().__init__()

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        """Compute scores (B, C_out) of each sample's channels."""
        return z.detach().abs().mean(dim=_spatial(z))


class FilterWeight(nn.Module):
    """Mean absolute weight of the filter, weights up to the threshold counted as zero; no sample matters (`weight`).

    The authors' second code zeroes single weights up to 1e-3 after each local epoch, which
    `clients.presets:weight_threshold` does; here the same score ranks whole channels.
    """

    predictive, scales = True, False
    threshold = 1e-3

    def __init__(self, conv: nn.Conv2d, rng: torch.Generator) -> None:
        super().__init__()

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        """Scores (B, C_out), equal rows."""
        size = filters.detach().abs()
        score = torch.where(size > self.threshold, size, 0.0).flatten(1).mean(dim=1)
        return score.expand(len(z), -1)
