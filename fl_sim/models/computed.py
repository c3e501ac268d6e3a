"""Tensors that a layer computes from others before each pass: parametrizations, weight and spectral norm, pruning by PyTorch."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fl_sim.models.parameters import computed_by_hooks


def computed(layer: nn.Module) -> list[str]:
    """Names of a layer's own tensors that are computed from others, such as "weight"."""
    return [*chains(layer), *computed_by_hooks(layer)]


def chains(layer: nn.Module) -> dict[str, nn.Module]:
    """Tensor of a layer that parametrizations compute -> these, as one module."""
    return dict(cast(nn.ModuleDict, layer.parametrizations)) if parametrize.is_parametrized(layer) else {}


def detach_computed(model: nn.Module) -> None:
    """Detach tensors that a builder left as plain attributes, such as the weight that `torch.nn.utils.prune` computes.

    A model that holds a part of a gradient's graph cannot be copied; the next forward pass computes such tensors anew.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                module.__dict__[name] = value.detach()


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, also where its last pass left computed tensors in it that are part of a gradient's graph."""
    detach_computed(model)
    return copy.deepcopy(model)
