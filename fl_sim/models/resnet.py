"""CIFAR ResNets (He et al., 2016, section 4.2) with option B shortcuts: 1x1 convolution and BatchNorm.

Depth 6n+2: three stages of n blocks with 16, 32 and 64 channels. ResNet-20 has 272,474 parameters, ResNet-32 466,906,
ResNet-110 1,730,714.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from fl_sim.core.types import UserError


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x), inplace=True)  # nobody else sees the sum


def stage(block: Callable[[int, int, int], nn.Module], before: int, after: int, blocks: int, stride: int) -> nn.Module:
    """`blocks` blocks of (channels in, channels out, stride), the first of which changes channels and resolution."""
    return nn.Sequential(block(before, after, stride), *(block(after, after, 1) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """Input (B, C, H, W) of any size from 4 pixels; output logits (B, num_classes)."""

    def __init__(self, depth: int, *, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"a CIFAR ResNet has depth 6n+2 (8, 14, 20, ...), not {depth}")
        first, second, third = (max(1, round(c * width)) for c in (16, 32, 64))
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = stage(Block, first, first, blocks, 1)
        self.layer2 = stage(Block, first, second, blocks, 2)
        self.layer3 = stage(Block, second, third, blocks, 2)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _build(depth: int, *, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    return CifarResNet(depth, num_classes=num_classes, in_channels=in_channels, width=width)


def cifar_resnet(depth: int) -> partial[nn.Module]:
    """The builder of one depth."""
    builder = partial(_build, depth)
    builder.__doc__ = f"CIFAR ResNet-{depth} with option B shortcuts (He et al., 2016)."
    return builder
