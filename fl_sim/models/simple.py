"""Small networks: the benchmark CNN, a tiny BatchNorm CNN, a perceptron."""

from __future__ import annotations

import math

from torch import nn


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def cnn(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Two convolutions, two linear layers, dropout: 1,626,442 parameters on 32x32 RGB.

    The CIFAR-10 network of the pfl-research benchmarks (arXiv 2404.06430): conv 3x3-32, conv 3x3-64, max-pool 2, dropout
    0.25, linear 128, dropout 0.5, linear. ReLU after each hidden layer, no padding.
    """
    first, second, hidden = (_scaled(c, width) for c in (32, 64, 128))
    side = (image_size - 4) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, first, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(first, second, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(second * side * side, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, num_classes),
    )


def cnn_bn(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Three convolutions with BatchNorm and global pooling: about 24,000 parameters, for small images and tests."""
    first, second, third = (_scaled(c, width) for c in (16, 32, 64))

    def stage(before: int, after: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *stage(in_channels, first, 1),
        *stage(first, second, 2),
        *stage(second, third, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(third, num_classes),
    )


def linear(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Linear or logistic regression, one layer; for images, tables and signals."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))


def mlp(*, num_classes: int, input_shape: tuple[int, ...], width: float = 1.0) -> nn.Module:
    """MLP with one hidden layer of 64 units, no BatchNorm; for images, tables and signals."""
    hidden = _scaled(64, width)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, num_classes),
    )
