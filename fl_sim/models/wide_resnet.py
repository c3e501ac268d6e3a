"""Wide ResNets (Zagoruyko and Komodakis, 2016): pre-activation blocks, depth 6n+4, k times the channels of a CIFAR ResNet.

WRN-28-10 has 36,479,194 parameters, as published (36.5M); WRN-28-8 has 23,354,842.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from fl_sim.models.resnet import stage


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice. A 1x1 convolution carries the input where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.bn1(x))
        carried = x if self.shortcut is None else self.shortcut(active)
        out = functional.relu(self.bn2(self.conv1(active)))
        return self.conv2(out) + carried  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """Input (B, C, H, W) of any size from 4 pixels; output logits (B, num_classes)."""

    def __init__(self, depth: int, factor: int, *, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        stem = max(1, round(16 * width))
        first, second, third = (max(1, round(c * factor * width)) for c in (16, 32, 64))
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.layer1 = stage(WideBlock, stem, first, blocks, 1)
        self.layer2 = stage(WideBlock, first, second, blocks, 2)
        self.layer3 = stage(WideBlock, second, third, blocks, 2)
        self.bn = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(functional.relu(self.bn(out)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _build(
    depth: int, factor: int, *, num_classes: int, in_channels: int, image_size: int, width: float = 1.0
) -> nn.Module:
    return WideResNet(depth, factor, num_classes=num_classes, in_channels=in_channels, width=width)


def wide_resnet(depth: int, factor: int) -> partial[nn.Module]:
    """The builder of WRN-depth-factor; the depth is 6n+4."""
    assert depth >= 10
    assert (depth - 4) % 6 == 0
    builder = partial(_build, depth, factor)
    builder.__doc__ = f"Wide ResNet {depth}-{factor} (Zagoruyko and Komodakis, 2016)."
    return builder
