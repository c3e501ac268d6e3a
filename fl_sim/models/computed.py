"""Tensors that a layer computes from others before each pass: parametrizations, weight and spectral norm, pruning by PyTorch."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fl_sim.core.types import UserError
from fl_sim.models.parameters import computed_by_hooks

REMOVE = (
    (prune.BasePruningMethod, prune.remove),
    (WeightNorm, remove_weight_norm),
    (SpectralNorm, remove_spectral_norm),
)
"""What PyTorch computes a tensor with before each forward pass -> how it lets a parameter take the tensor's place."""


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


def materialized(model: nn.Module) -> nn.Module:
    """Put frozen parameters with the present values in the place of all computed tensors, in place, and return the model.

    It must be in evaluation mode, since in training mode a spectral norm's singular vectors move with each look at the weight.

    Raises:
        UserError: a hook that is none of PyTorch's computes a tensor.
    """
    for path, layer in model.named_modules():
        if parametrize.is_parametrized(layer):
            _unparametrize(layer)
        for name in computed_by_hooks(layer):
            _remove_hook(path, layer, name)
    return model


def _unparametrize(layer: nn.Module) -> None:
    """What `parametrize.remove_parametrizations` does, which would break the layer of which this one is a copy: it takes the
    computed tensors from the class that both have."""
    values = {name: getattr(layer, name).detach().clone() for name in chains(layer)}
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _remove_hook(path: str, layer: nn.Module, name: str) -> None:
    for hook in list(layer._forward_pre_hooks.values()):
        for kind, remove in REMOVE:
            if isinstance(hook, kind) and name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
                remove(layer, name)
                return
    raise UserError(
        f"{path}.{name}: a hook of one's own computes it before each forward pass; allowed: parametrizations, weight_norm, "
        "spectral_norm and prune of torch.nn.utils"
    )
