"""Structural pruning: channels whose BatchNorm scale training has driven to zero are cut out of the network.

A channel can go where one layer alone reads it: between two convolutions of a residual block, or between any two layers
of a plain network. The stream that shortcuts add to stays whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fl_sim.models import BATCHNORM
from fl_sim.models.graph import modules_of, trace

RECTIFIERS = frozenset({torch.relu, functional.relu})


@dataclass(frozen=True)
class Inner:
    """Channels between two layers, by module path.

    Attributes:
        conv, norm: the convolution that makes them and the BatchNorm behind it.
        reader: the one layer that reads them.
        reader_norm: the BatchNorm behind the reader; None where there is none.
    """

    conv: str
    norm: str
    reader: str
    reader_norm: str | None


def inner_channels(model: nn.Module) -> list[Inner]:
    """All places of a model where channels can be removed, in the order in which they run.

    Raises:
        UserError: the model's graph depends on its data.
    """
    traced = trace(model)
    called = modules_of(traced)
    found = []
    for node, module in called.items():
        conv = node.args[0]
        if not isinstance(module, BATCHNORM) or not isinstance(conv, fx.Node) or len(conv.users) != 1:
            continue
        made, reader = called.get(conv), _reader(node, called)
        if isinstance(made, nn.Conv2d) and made.groups == 1 and reader is not None:
            behind = next(iter(reader.users)) if len(reader.users) == 1 else None
            after = str(behind.target) if behind is not None and isinstance(called.get(behind), BATCHNORM) else None
            found.append(Inner(str(conv.target), str(node.target), str(reader.target), after))
    return found


def _reader(norm: fx.Node, called: Mapping[fx.Node, nn.Module]) -> fx.Node | None:
    """The convolution that alone reads what a BatchNorm makes, behind a rectifier; None where others read it too."""
    node = norm
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = called.get(node)
        if isinstance(module, nn.Conv2d):
            return node if module.groups == 1 else None
        if not isinstance(module, nn.ReLU) and node.target not in RECTIFIERS:
            return None
    return None


def remove_disabled(model: nn.Module, threshold: float = 0.01) -> nn.Module:
    """A copy without the inner channels whose |gamma| is below `threshold`; of each layer the strongest one stays.

    A removed channel was constant, relu(beta), up to its small gamma. What its reader made of that constant moves into
    the statistics behind the reader: exact away from the image's border, where zero padding differs from a constant.

    Args:
        model: any model whose graph can be traced; left as it is.
        threshold: of |gamma|; arXiv 2003.00152 calls a feature below 0.01 disabled.

    Raises:
        UserError: the model's graph depends on its data.
    """
    smaller = copy.deepcopy(model)
    for inner in inner_channels(model):
        norm = cast(nn.BatchNorm2d, smaller.get_submodule(inner.norm))
        gamma = norm.weight.detach().abs()
        keep = gamma >= threshold
        keep[gamma.argmax()] = True
        if not keep.all():
            _remove(smaller, inner, keep)
    return smaller


@torch.no_grad()
def _remove(model: nn.Module, inner: Inner, keep: Tensor) -> None:
    conv, reader = (cast(nn.Conv2d, model.get_submodule(path)) for path in (inner.conv, inner.reader))
    norm = cast(nn.BatchNorm2d, model.get_submodule(inner.norm))
    constant = functional.relu(norm.bias[~keep])
    shift = reader.weight[:, ~keep].sum(dim=(2, 3)) @ constant
    if inner.reader_norm is not None:
        model.get_buffer(f"{inner.reader_norm}.running_mean").sub_(shift)
    elif reader.bias is not None:
        reader.bias.add_(shift)
    _cut(conv, keep, ("weight", "bias"))
    _cut(norm, keep, ("weight", "bias", "running_mean", "running_var"))
    reader.weight = nn.Parameter(reader.weight[:, keep].clone(), requires_grad=reader.weight.requires_grad)
    conv.out_channels = norm.num_features = reader.in_channels = int(keep.count_nonzero())


def _cut(layer: nn.Module, keep: Tensor, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(layer, name)
        if isinstance(value, nn.Parameter):
            setattr(layer, name, nn.Parameter(value[keep].clone(), requires_grad=value.requires_grad))
        elif value is not None:
            setattr(layer, name, value[keep].clone())


def shrink(model: nn.Module, shapes: Mapping[str, torch.Size]) -> nn.Module:
    """Make inner channels as few as in `shapes`, in place, so that a pruned model's parameters can be loaded.

    Args:
        model: as its architecture builds it.
        shapes: of the stored entries; only a smaller number of inner channels is taken from them.

    Returns:
        The model; where `shapes` asks for anything else than fewer inner channels it stays as it was.
    """
    for inner in inner_channels(model):
        norm = cast(nn.BatchNorm2d, model.get_submodule(inner.norm))
        stored = shapes.get(f"{inner.norm}.weight", norm.weight.shape)
        if len(stored) == 1 and 0 < stored[0] < norm.num_features:
            keep = torch.zeros(norm.num_features, dtype=torch.bool)
            keep[: stored[0]] = True
            _remove(model, inner, keep)
    return model
