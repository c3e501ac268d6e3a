"""MobileNet (Howard et al., 2017): depthwise separable convolutions; the first version, which torchvision lacks."""

from __future__ import annotations

from torch import nn

from fl_sim.models.torchvision import SMALL

LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Output channels and stride of the depthwise separable layers, table 1 of the paper (whose last stride is a misprint)."""


def _conv(before: int, after: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


def mobilenet_v1(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """MobileNet v1: 4,231,976 parameters for 1,000 classes; the first stride is 1 for images of up to 64 pixels."""
    before = max(1, round(32 * width))
    layers = _conv(in_channels, before, 3, stride=1 if image_size <= SMALL else 2)
    for channels, stride in LAYERS:
        after = max(1, round(channels * width))
        layers += _conv(before, before, 3, stride=stride, groups=before) + _conv(before, after, 1)
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))
