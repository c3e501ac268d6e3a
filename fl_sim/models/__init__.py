"""Models by name, and the only place that knows layer types.

model = build("resnet20", num_classes=10, in_channels=3, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fl_sim.lookup import find
from fl_sim.models.resnet import cifar_resnet
from fl_sim.models.simple import cnn, cnn_bn, mlp
from fl_sim.models.torchvision import imagenet_stem, resnet18, resnet34, resnet50
from fl_sim.types import UserError

__all__ = ["MODELS", "Builder", "batchnorm_names", "build", "prunable_names", "stage_names"]

Builder = Callable[..., nn.Module]
"""Takes keyword arguments num_classes, in_channels, image_size (pixels a side) and width (channel multiplier)."""

MODELS: Mapping[str, Builder] = {
    "cnn": cnn,
    "cnn_bn": cnn_bn,
    "mlp": mlp,
    **{f"resnet{depth}": cifar_resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110, 218, 434, 866)},
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    **{f"{name}_imagenet_stem": imagenet_stem(name) for name in ("resnet18", "resnet34", "resnet50")},
}


def build(
    name: str, *, num_classes: int = 10, in_channels: int = 3, seed: int = 0, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """Build a model on the CPU, initialised from `seed` alone; the global generator is left as it was.

    Args:
        name: a name of `MODELS`, or `module:function` of your own with the same keyword arguments.
        num_classes: outputs.
        in_channels: channels of the images.
        seed: initialisation.
        image_size: pixels a side.
        width: channel multiplier, 1 = as published.

    Raises:
        UserError: unknown name.
    """
    builder = find("model.name", name, MODELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder(num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)


PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prunable_names(model: nn.Module) -> list[str]:
    """Names of the weights of convolutions and linear layers, in module order; biases and norms are never pruned."""
    return [
        f"{name}.weight".removeprefix(".") for name, module in model.named_modules() if isinstance(module, PRUNABLE)
    ]


def batchnorm_names(model: nn.Module) -> list[str]:
    """Names of BatchNorm's affine parameters (weight = gamma, bias = beta), in module order."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BATCHNORM) and m.affine]
    return [f"{name}.{part}".removeprefix(".") for name, _ in layers for part in ("weight", "bias")]


def stage_names(model: nn.Module) -> list[str]:
    """Names of a residual network's stages (`layer1`, ...), whose outputs feature distillation compares.

    Raises:
        UserError: the model has none.
    """
    names = [name for name, _ in model.named_children() if name.startswith("layer")]
    if not names:
        children = ", ".join(name for name, _ in model.named_children())
        raise UserError(f"stages: {type(model).__name__} has no layer1, layer2, ...; name them, allowed: {children}")
    return names
