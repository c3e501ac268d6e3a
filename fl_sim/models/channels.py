"""Structural pruning: channels whose BatchNorm scale training has driven to zero are cut out of the network.

A channel can go where one layer alone reads it: between two convolutions of a residual block, or between any two layers
of a plain network. The stream that shortcuts add to stays whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fl_sim.models import BATCHNORM
from fl_sim.models.computed import computed, copied
from fl_sim.models.graph import modules_of, trace

RECTIFIERS = frozenset({torch.relu, functional.relu})


@dataclass(frozen=True)
class Inner:
    """Channels between two layers, by module path.

    Attributes:
        conv, norm: the convolution that makes them and the BatchNorm behind it.
        reader: the one layer that reads them.
        reader_norm: the BatchNorm behind the reader; None where there is none.
        rectified: whether a ReLU lies between `norm` and the reader.
    """

    conv: str
    norm: str
    reader: str
    reader_norm: str | None
    rectified: bool

    def constant(self, beta: Tensor) -> Tensor:
        """Constant output of channels whose gamma is 0, which their reader gets."""
        return functional.relu(beta) if self.rectified else beta


def inner_channels(model: nn.Module) -> list[Inner]:
    """Find all places of a model where channels can be removed, in the order in which they run.

    Raises:
        UserError: the model's graph depends on its data.
    """
    traced = trace(model)
    called, shared = modules_of(traced), _shared(traced)
    found = []
    for node, module in called.items():
        conv = node.args[0]
        if not isinstance(module, BATCHNORM) or not isinstance(conv, fx.Node) or len(conv.users) != 1:
            continue
        made, (reader, rectified) = called.get(conv), _reader(node, called)
        if not module.affine or computed(module) or not _is_whole(made) or reader is None:
            continue
        behind = next(iter(reader.users)) if len(reader.users) == 1 else None
        after = str(behind.target) if behind is not None and isinstance(called.get(behind), BATCHNORM) else None
        inner = Inner(str(conv.target), str(node.target), str(reader.target), after, rectified)
        if shared.isdisjoint({inner.conv, inner.norm, inner.reader, inner.reader_norm}):
            found.append(inner)
    return found


def _is_whole(module: nn.Module | None) -> bool:
    """Whether a module is a convolution without groups whose tensors are its own, not computed from others."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and not computed(module)


def _shared(traced: fx.GraphModule) -> set[str]:
    """Paths of modules that run more than once, or whose parameters another module or the graph itself reads too."""
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    read = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    named = list(traced.named_parameters(remove_duplicate=False))
    owners = Counter(id(parameter) for _, parameter in named)
    read += [name for name, parameter in named if owners[id(parameter)] > 1]
    return {path for path, times in calls.items() if times > 1} | {name.rpartition(".")[0] for name in read}


def _reader(norm: fx.Node, called: Mapping[fx.Node, nn.Module]) -> tuple[fx.Node | None, bool]:
    """The convolution that alone reads what a BatchNorm makes, and whether a ReLU lies between.

    The convolution is None where others read it too, or anything else lies between.
    """
    node, rectified = norm, False
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = called.get(node)
        if isinstance(module, nn.Conv2d):
            return node if _is_whole(module) else None, rectified
        if not isinstance(module, nn.ReLU) and node.target not in RECTIFIERS:
            break
        rectified = True
    return None, rectified


def remove_disabled(model: nn.Module, threshold: float = 0.01) -> nn.Module:
    """A copy without the inner channels whose |gamma| is below `threshold`; of each layer the strongest one stays.

    A removed channel was constant up to its small gamma: relu(beta), or beta where no ReLU follows. What its reader made
    of that constant moves into the mean of the BatchNorm behind the reader, else into the reader's bias, which a reader
    without one is given. Exact in evaluation mode where the reader pads nothing; with zero padding exact away from the
    image's border, where a constant channel ended in zeros.

    Args:
        model: any model whose graph can be traced; left as it is.
        threshold: of |gamma|; arXiv 2003.00152 calls a feature below 0.01 disabled.

    Raises:
        UserError: the model's graph depends on its data.
    """
    smaller = copied(model)
    for inner in inner_channels(model):
        norm = cast(nn.BatchNorm2d, smaller.get_submodule(inner.norm))
        gamma = norm.weight.detach().abs()
        keep = gamma >= threshold
        keep[gamma.argmax()] = True
        if not keep.all():
            _move_constant(smaller, inner, ~keep)
            _narrow(smaller, inner, keep)
    return smaller


@torch.no_grad()
def _move_constant(model: nn.Module, inner: Inner, removed: Tensor) -> None:
    """Add what the reader makes of the removed channels' constants to what lies behind the reader."""
    reader = cast(nn.Conv2d, model.get_submodule(inner.reader))
    beta = cast(nn.BatchNorm2d, model.get_submodule(inner.norm)).bias
    shift = reader.weight[:, removed].sum(dim=(2, 3)) @ inner.constant(beta[removed])
    if inner.reader_norm is not None:
        mean = cast(nn.BatchNorm2d, model.get_submodule(inner.reader_norm)).running_mean
        if mean is not None:  # a BatchNorm that normalises by its batch takes a constant away by itself
            mean.sub_(shift)
    elif shift.any():
        _with_bias(reader).add_(shift)


def _with_bias(conv: nn.Conv2d) -> Tensor:
    """The convolution's bias; one of zeros is made where it has none."""
    if conv.bias is None:
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=conv.weight.requires_grad)
    return conv.bias


def _narrow(model: nn.Module, inner: Inner, keep: Tensor) -> None:
    """Cut all but the kept channels out of the convolution, its BatchNorm and the reader."""
    conv, reader = (cast(nn.Conv2d, model.get_submodule(path)) for path in (inner.conv, inner.reader))
    norm = cast(nn.BatchNorm2d, model.get_submodule(inner.norm))
    _cut(conv, keep, ("weight", "bias"))
    _cut(norm, keep, ("weight", "bias", "running_mean", "running_var"))
    kept = reader.weight.detach()[:, keep].clone()
    reader.weight = nn.Parameter(kept, requires_grad=reader.weight.requires_grad)
    conv.out_channels = norm.num_features = reader.in_channels = int(keep.count_nonzero())


@torch.no_grad()
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
        shapes: of the stored entries; only a smaller number of inner channels is taken from them, and with it a bias of
            their reader.

    Returns:
        The model; where `shapes` asks for anything else than fewer inner channels it stays as it was.
    """
    for inner in inner_channels(model):
        norm = cast(nn.BatchNorm2d, model.get_submodule(inner.norm))
        stored = shapes.get(f"{inner.norm}.weight", norm.weight.shape)
        if len(stored) == 1 and 0 < stored[0] < norm.num_features:
            keep = torch.zeros(norm.num_features, dtype=torch.bool)
            keep[: stored[0]] = True
            _narrow(model, inner, keep)
            if f"{inner.reader}.bias" in shapes:
                _with_bias(cast(nn.Conv2d, model.get_submodule(inner.reader)))
    return model
