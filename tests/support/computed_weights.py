"""Models with BatchNorm whose convolutions compute their weights from other tensors, in each of PyTorch's ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from gated import lively
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

WAYS: Mapping[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm_old": weight_norm,
    "spectral_norm_old": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
SIZES = ((1, 8), (8, 16), (16, 12), (12, 6))


def chain(way: str | None = None, layers: Collection[int] = (1,)) -> nn.Module:
    """Four convolutions "0", "3", "6" and "9", each read by the next alone; those at these places compute their weights."""
    parts: list[nn.Module] = []
    for at, (inputs, outputs) in enumerate(SIZES):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        if way is not None and at in layers:
            WAYS[way](conv)
        parts += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return lively(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)))


def build_pruned(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """For configs: the second convolution has half of its weights pruned by PyTorch."""
    return chain("pruned")


def build_normed(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """For configs: the second convolution has a weight norm."""
    return chain("weight_norm")


def build_before_normed(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """For configs: the third convolution, which reads the second one's channels, has a weight norm."""
    return chain("weight_norm", (2,))


def build_all_normed(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """For configs: every weight is computed."""
    norm = parametrizations.weight_norm
    return nn.Sequential(
        norm(nn.Conv2d(in_channels, 8, 3, padding=1)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(8 * image_size**2, 10))
    )
