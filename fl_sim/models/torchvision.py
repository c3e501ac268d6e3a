"""torchvision's networks, with a stem and a head for small images of up to 64 pixels, as the literature on CIFAR has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fl_sim.core.types import UserError

SMALL = 64


def _cifar_stem(model: nn.Module, in_channels: int) -> nn.Conv2d:
    model.maxpool = nn.Identity()
    return nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)


def _imagenet_stem(model: nn.Module, in_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)


Stem = Callable[[nn.Module, int], nn.Conv2d]
"""(model, image channels) -> its first convolution; may change what follows it."""


def _require_one_width(name: str, width: float) -> None:
    if width != 1.0:
        raise UserError(f"model.width = {width}: {name} has one width; the CIFAR ResNets (resnet20, ...) have others")


def _resnet(
    name: str, *, num_classes: int, in_channels: int, image_size: int, width: float = 1.0, stem: Stem | None = None
) -> nn.Module:
    # torchvision costs most of a second to import and few runs need it.
    import torchvision

    _require_one_width(name, width)
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


def vgg16(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """torchvision's VGG-16 with BatchNorm; one linear layer for small images (14,728,266 parameters on CIFAR-10)."""
    from torchvision.models.vgg import cfgs, make_layers, vgg16_bn

    _require_one_width("vgg16", width)
    if image_size > SMALL:
        model: nn.Module = vgg16_bn(weights=None, num_classes=num_classes)
        model.set_submodule("features.0", _first(in_channels, 3, stride=1))
        return model
    # An image that is down to one pixel is pooled no further.
    pools = iter([image_size >> n > 1 for n in range(5)])
    features = make_layers([layer for layer in cfgs["D"] if layer != "M" or next(pools)], batch_norm=True)
    for module in features:
        if isinstance(module, nn.Conv2d):
            _initialise(module)
    features[0] = _first(in_channels, 3, stride=1)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


def densenet121(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """torchvision's DenseNet-121."""
    from torchvision.models import densenet121 as published

    _require_one_width("densenet121", width)
    model: nn.Module = published(weights=None, num_classes=num_classes)
    small = image_size <= SMALL
    stem = _first(in_channels, 3 if small else 7, stride=1 if small else 2, bias=False)
    model.set_submodule("features.conv0", stem)
    if small:
        model.set_submodule("features.pool0", nn.Identity())
    return model


def _first(in_channels: int, size: int, *, stride: int, bias: bool = True) -> nn.Conv2d:
    """The first convolution, for any number of channels."""
    return _initialise(nn.Conv2d(in_channels, 64, size, stride=stride, padding=size // 2, bias=bias))


def _initialise(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
