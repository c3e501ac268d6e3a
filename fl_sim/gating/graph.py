"""Finds convolutions to gate, those that BatchNorm follows, and the layers that read their channels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fl_sim.models import BATCHNORM
from fl_sim.models.graph import modules_of

# Channel by channel, and what is zero stays zero: an off channel is still off behind them.
CHANNELWISE_MODULES = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
)
CHANNELWISE_FUNCTIONS: frozenset[object] = frozenset(
    {
        torch.relu,
        functional.relu,
        functional.relu6,
        functional.leaky_relu,
        functional.silu,
        functional.gelu,
        functional.hardswish,
        functional.max_pool2d,
        functional.avg_pool2d,
        functional.adaptive_avg_pool2d,
        torch.flatten,
    }
)
CHANNELWISE_METHODS = frozenset({"relu", "flatten", "mean", "contiguous"})
ADDITIONS: frozenset[object] = frozenset({operator.add, operator.iadd, torch.add})


@dataclass(frozen=True)
class Pair:
    """A convolution and the BatchNorm behind it, by module path."""

    conv: str
    norm: str

    @property
    def key(self) -> str:
        """The path as a name of a `ModuleDict`."""
        return self.conv.replace(".", "_")


def find_pairs(traced: fx.GraphModule) -> list[tuple[Pair, fx.Node, fx.Node]]:
    """Convolutions to gate, with their nodes: BatchNorm alone reads them.

    Left out are those that carry the stream on which all else builds, at a per cent of the MACs: the one that reads the
    image, and projections of a residual stream (they read what others read too, and lead straight to an addition).
    """
    called = modules_of(traced)
    found = []
    for norm, module in called.items():
        conv = norm.args[0]
        if not isinstance(module, BATCHNORM) or not isinstance(conv, fx.Node):
            continue
        if not isinstance(called.get(conv), nn.Conv2d) or len(conv.users) != 1:
            continue
        source = conv.args[0]
        assert isinstance(source, fx.Node)
        projects = len(source.users) > 1 and all(user.target in ADDITIONS for user in norm.users)
        if source.op != "placeholder" and not projects:
            found.append((Pair(str(conv.target), str(norm.target)), conv, norm))
    return found


def is_channelwise(node: fx.Node, called: Mapping[fx.Node, nn.Module]) -> bool:
    """Whether the node maps each channel of its first argument by itself, and zero to zero."""
    if node.op == "call_module":
        return isinstance(called[node], CHANNELWISE_MODULES)
    if node.op == "call_method":
        return node.target in CHANNELWISE_METHODS
    return node.op == "call_function" and node.target in CHANNELWISE_FUNCTIONS


def channels_from(traced: fx.GraphModule, is_gate: Callable[[nn.Module], bool]) -> dict[fx.Node, fx.Node]:
    """Node -> the gate whose off channels are exactly zero in the node's result."""
    called = modules_of(traced)
    origin: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node in called and is_gate(called[node]):
            origin[node] = node
        elif node.args and node.args[0] in origin and is_channelwise(node, called):
            origin[node] = origin[node.args[0]]
    return origin


def kept_channels(ratio: float, channels: int) -> int:
    """round(ratio * channels) as in the authors' code (arXiv 2106.06921), at least 1: 11 of 16 at 0.7; halves go to even."""
    return max(1, round(ratio * channels))


def top_channels(scores: Tensor, keep: int) -> Tensor:
    """Mask (B, C), bool, of the `keep` highest scores of each row; equal scores: lowest index first."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
