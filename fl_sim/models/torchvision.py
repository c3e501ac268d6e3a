"""torchvision's ResNets, with the CIFAR stem (3x3 stride 1, no max-pool) for images of up to 64 pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fl_sim.types import UserError

SMALL = 64


def _cifar_stem(model: nn.Module, in_channels: int) -> nn.Conv2d:
    model.maxpool = nn.Identity()
    return nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)


def _imagenet_stem(model: nn.Module, in_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)


Stem = Callable[[nn.Module, int], nn.Conv2d]
"""(model, image channels) -> its first convolution; may change what follows it."""


def _resnet(
    name: str, *, num_classes: int, in_channels: int, image_size: int, width: float = 1.0, stem: Stem | None = None
) -> nn.Module:
    # torchvision costs most of a second to import and few runs need it.
    import torchvision

    if width != 1.0:
        raise UserError(f"model.width = {width}: {name} has one width; the CIFAR ResNets (resnet20, ...) have others")
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=num_classes)
    chosen = stem or (_cifar_stem if image_size <= SMALL else _imagenet_stem)
    model.conv1 = first = chosen(model, in_channels)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet18(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """torchvision's ResNet-18."""
    return _resnet("resnet18", num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)


def resnet34(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """torchvision's ResNet-34."""
    return _resnet("resnet34", num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)


def resnet50(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """torchvision's ResNet-50."""
    return _resnet("resnet50", num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)


def imagenet_stem(name: str) -> partial[nn.Module]:
    """The builder of one ResNet whose stem is ImageNet's for images of any size: what the CIFAR stem is compared with."""
    builder = partial(_resnet, name, stem=_imagenet_stem)
    builder.__doc__ = f"torchvision's {name} with ImageNet's stem (7x7 stride 2, max-pool) for images of any size."
    return builder
