"""What a layer is to the methods: prunable, BatchNorm, head. The only module that tells layer types apart by role."""

from __future__ import annotations

import torch
from torch import nn

from fl_sim.core.types import UserError

CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRUNABLE = (*CONVOLUTION, nn.Linear)
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCHNORM, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def prunable_names(model: nn.Module) -> list[str]:
    """Names of the weight matrices, in module order; biases, norms and other vectors are never pruned.

    Weight matrices are the weights of convolutions and linear layers, of recurrent layers, attention and embeddings, and
    every other parameter of at least two dimensions above 1. What a parametrization computes a weight from is none.
    """
    names = []
    for path, module in model.named_modules():  # every client asks for them every round
        if isinstance(module, PRUNABLE):
            names.append(f"{path}.weight")
        elif module._parameters and not isinstance(module, NORMS):
            names += [f"{path}.{name}" for name in _matrices(path, module)]
    return [name.removeprefix(".") for name in names]


def _matrices(path: str, module: nn.Module) -> list[str]:
    """Names of a module's own parameters that are matrices."""
    if ".parametrizations." in f".{path}.":
        return []
    least = 1 if isinstance(module, RECURRENT) else 2
    given = {name: parameter.shape for name, parameter in module._parameters.items() if parameter is not None}
    return [name for name, shape in given.items() if len(shape) > 1 and sum(size > 1 for size in shape) >= least]


def map_names(model: nn.Module) -> list[str]:
    """Names of the weights of convolutions and linear layers alone, in module order."""
    return [f"{n}.weight".removeprefix(".") for n, m in model.named_modules() if isinstance(m, PRUNABLE)]


def batchnorm_names(model: nn.Module) -> list[str]:
    """Names of BatchNorm's affine parameters (weight = gamma, bias = beta), in module order."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BATCHNORM) and m.affine]
    return [f"{name}.{part}".removeprefix(".") for name, _ in layers for part in ("weight", "bias")]


def head_names(model: nn.Module) -> list[str]:
    """Names of the parameters of the last linear layer; none where a model has no linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        return []
    return [f"{linear[-1]}.{part}".removeprefix(".") for part, _ in model.get_submodule(linear[-1]).named_parameters()]


def disabled_features(model: nn.Module, threshold: float = 0.01) -> dict[str, float]:
    """BatchNorm layer -> share of its channels with |gamma| below `threshold` (arXiv 2003.00152, section 5)."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BATCHNORM) and m.affine]
    return {name: float((layer.weight.detach().abs() < threshold).to(torch.float64).mean()) for name, layer in layers}


def stage_names(model: nn.Module) -> list[str]:
    """Names of a residual network's stages (`layer1`, ...), whose outputs feature distillation compares.

    Raises:
        UserError: the model has none.
    """
    names = [name for name, _ in model.named_children() if name.startswith("layer")]
    if not names:
        children = ", ".join(name for name, _ in model.named_children())
        raise UserError(f"stages: {type(model).__name__} has no layer1, layer2, ...; name them, allowed: {children}")
    return names
