"""Models with channels that BatchNorm has disabled."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fl_sim import models


def trained_like(name: str, size: int = 16, width: float = 1.0) -> nn.Module:
    """Random statistics, and a third of the gammas exactly zero with a beta that is not."""
    model = models.build(name, in_channels=3, image_size=size, width=width)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(generator=generator)
                layer.running_var.uniform_(0.5, 2.0, generator=generator)
                layer.bias.normal_(generator=generator)
                layer.weight.uniform_(0.5, 1.0, generator=generator)
                layer.weight[torch.rand(len(layer.weight), generator=generator) < 1 / 3] = 0.0
    return model.eval()


def interior(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of a copy that pads with what it reads at the border instead of zeros."""
    padded = copy.deepcopy(model)
    for layer in padded.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "replicate"
            layer._reversed_padding_repeated_twice = [p for p in reversed(layer.padding) for _ in range(2)]
    with torch.inference_mode():
        return padded(x)
