"""torchvision's ResNets, with the CIFAR stem (3x3 stride 1, no max-pool) for images of up to 64 pixels."""

from __future__ import annotations

from torch import nn

from fl_sim.types import UserError

SMALL = 64


def _resnet(name: str, *, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    # torchvision costs most of a second to import and few runs need it.
    import torchvision

    if width != 1.0:
        raise UserError(f"model.width = {width}: {name} has one width; the CIFAR ResNets (resnet20, ...) have others")
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=num_classes)
    if image_size <= SMALL:
        model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
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
