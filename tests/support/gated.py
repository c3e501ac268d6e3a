"""Images, and models whose BatchNorm layers and gates hold chosen values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_sim.gating import Gated


def images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm with random affine parameters and statistics: nothing is symmetric by accident."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.dtype.is_floating_point and value.dim() == 1 and "linear" not in name and "fc" not in name:
            value.copy_(torch.rand(value.shape, generator=rng) + 0.5)
    return model


def unit(gated: Gated) -> Gated:
    """Every learned gate at exactly one."""
    for g in gated.gates.values():
        for p in g.parameters():
            nn.init.zeros_(p)
    return gated
