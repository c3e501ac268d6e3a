"""Layer roles: prunable, BatchNorm, head. The only module that tells layer types apart by role."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl_sim.core.types import UserError
from fl_sim.models.parameters import FLOATS, canonical
from fl_sim.models.reparametrized import Reparametrized

CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRUNABLE = (*CONVOLUTION, nn.Linear)
BATCHNORM = (_BatchNorm,)
"""BatchNorm of any dimension, synchronised or not, and classes derived from it."""
STATISTICS = {"running_mean", "running_var"}
NORMS = (*BATCHNORM, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def as_entries(model: nn.Module, names: Iterable[str]) -> list[str]:
    """List the state-dict entries of the named parameters, each once.

    A tensor that is computed from parameters (weight norm) is no entry, and its name is left out.
    """
    entry = canonical(model)
    return list(dict.fromkeys(entry[name] for name in names if name in entry))


def prunable_names(model: nn.Module) -> list[str]:
    """Names of the weight matrices, in module order; biases, norms and other vectors are never pruned.

    Weight matrices are the weights of convolutions and linear layers, of recurrent layers, attention and embeddings, and
    every other parameter of at least two dimensions above 1. What a parametrization computes a weight from is none, low-rank
    adapters excepted. A matrix that layers share has the first of its names.
    """
    found: dict[int, str] = {}  # by identity: layers that share a weight have one entry
    held: list[Tensor] = []  # so that no other tensor gets the identity of one that is gone
    for path, module in model.named_modules():  # every client asks for them every round
        own = module._parameters
        if isinstance(module, PRUNABLE):
            names = ["weight"] if own.get("weight") is not None else []  # weight_norm computes it from others
        else:
            names = _matrices(path, module) if own and not isinstance(module, NORMS) else []
        for name in names:
            held.append(own[name])
            if held[-1].dtype in FLOATS:
                found.setdefault(id(held[-1]), f"{path}.{name}".removeprefix("."))
    return list(found.values())


def _matrices(path: str, module: nn.Module) -> list[str]:
    """Names of a module's own parameters that are matrices."""
    if ".parametrizations." in f".{path}.":
        return list(module.sparse) if isinstance(module, Reparametrized) else []
    given = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    return [name for name, parameter in given.items() if _is_matrix(module, parameter)]


def _is_matrix(module: nn.Module, value: Tensor) -> bool:
    """Whether a tensor of a layer that is neither convolution, linear nor norm is one of its weight matrices."""
    least = 1 if isinstance(module, RECURRENT) else 2
    return value.dim() > 1 and sum(size > 1 for size in value.shape) >= least


def is_weight(module: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a layer's own tensor, a parameter or computed from others, has the role of a weight matrix."""
    if isinstance(module, PRUNABLE):
        return name == "weight"
    return not isinstance(module, NORMS) and _is_matrix(module, value)


def row_blocks(model: nn.Module) -> dict[str, int]:
    """Weight matrix -> how many equal blocks its rows, the outputs, are of: one, or the gates of a recurrent layer.

    0 = the rows are tokens and the columns outputs, as in embeddings. Layers whose outputs are not told by their rows have no
    entry: recurrent ones of two directions or with a projection, attention, parameters of one's own.
    """
    found: dict[str, int] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, PRUNABLE):
            found[f"{path}.weight".removeprefix(".")] = 1
        elif isinstance(layer, nn.Embedding):
            found[f"{path}.weight".removeprefix(".")] = 0
        elif isinstance(layer, nn.RNNBase) and not layer.bidirectional and not layer.proj_size:
            gates = layer.get_parameter("weight_hh_l0").shape[0] // layer.hidden_size
            found |= {f"{path}.{name}".removeprefix("."): gates for name, _ in layer.named_parameters(recurse=False)}
    return found


def map_names(model: nn.Module) -> list[str]:
    """Names of the weights of convolutions and linear layers alone, in module order."""
    maps = (f"{n}.weight".removeprefix(".") for n, m in model.named_modules() if isinstance(m, PRUNABLE))
    return as_entries(model, maps)


def batchnorm_names(model: nn.Module) -> list[str]:
    """Names of BatchNorm's affine parameters (weight = gamma, bias = beta), in module order."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BATCHNORM) and m.affine]
    return as_entries(model, [f"{name}.{part}".removeprefix(".") for name, _ in layers for part in ("weight", "bias")])


def norm_names(model: nn.Module) -> list[str]:
    """Names of the scales and shifts of all normalisation layers, BatchNorm among them, in module order."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, NORMS)]
    return as_entries(
        model,
        [
            f"{name}.{part}".removeprefix(".")
            for name, layer in layers
            for part, _ in layer.named_parameters(recurse=False)
        ],
    )


def sparse_gradient_names(model: nn.Module) -> list[str]:
    """Weights that train and whose gradients PyTorch makes sparse: of embeddings with `sparse = True`."""
    return [
        f"{path}.weight".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad
    ]


def statistics_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path of each layer with running statistics -> the layer, whatever its class: it is known by its buffers."""
    return {name: layer for name, layer in model.named_modules() if _own_buffers(layer) >= STATISTICS}


def _own_buffers(layer: nn.Module) -> set[str]:
    return {name for name, value in layer.named_buffers(recurse=False) if value is not None}


HEAD = "_fl_sim_head"
"""The attribute of a user's own module that gave the answer, or that ran last, when the model was tried; see `models.own`."""


def head_names(model: nn.Module) -> list[str]:
    """Names of the parameters of the head: the last linear layer; none where a model has no linear layer.

    Of a user's own model it is the layer whose output is the answer, or else the last one that runs, wherever it is registered.

    Linear layers inside a module with `beside_the_path = True`, as gates are, come last in module order and are no head.
    """
    head = head_module(model)
    if head is None:
        return []
    parts = [part for part, _ in model.get_submodule(head).named_parameters()]
    return as_entries(model, [f"{head}.{part}".removeprefix(".") for part in parts])


def head_module(model: nn.Module) -> str | None:
    """Name of the last linear layer, as `head_names` finds it; None where a model has none."""
    marked: str | None = next((name for name, module in model.named_modules() if HEAD in vars(module)), None)
    if marked is not None:
        return marked
    beside = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "beside_the_path", False))
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not name.startswith(beside)
    ]
    return linear[-1] if linear else None


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
