"""Weights that a model computes from a frozen original and a few trained parameters, and the way back to plain weights.

PyTorch names the parts of a weight `W` of the layer `L`: `L.parametrizations.W.original`, and `L.parametrizations.W.0.NAME`
for the parameters that it is computed with.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from fl_sim.core.types import Params

INSIDE, ORIGINAL, FIRST = ".parametrizations.", ".original", ".0."


class Reparametrized(nn.Module):
    """Computes a weight from its frozen original and parameters of its own; a module for `parametrize`."""

    sparse: tuple[str, ...] = ()
    """Own parameters that may travel sparse and in other value types, as weight matrices do."""

    def first(self, weight: Tensor) -> Params:
        """First values of own parameters that follow from the original weight, by name."""
        return {}


def parts(model: nn.Module) -> dict[str, Reparametrized]:
    """Name of each weight that is computed so -> the module that computes it."""
    found: dict[str, Reparametrized] = {}
    for path, layer in model.named_modules():
        if not parametrize.is_parametrized(layer):
            continue
        for name, chain in layer.parametrizations.items():
            if isinstance(part := chain[0], Reparametrized):
                found[f"{path}.{name}".removeprefix(".")] = part
    return found


def split_name(weight: str) -> tuple[str, str]:
    """(name of a weight's original, what the names of its part's parameters begin with)."""
    layer, _, name = weight.rpartition(".")
    inside = f"{layer}{INSIDE}{name}".removeprefix(".")
    return inside + ORIGINAL, inside + FIRST


def merged(params: Params, *, model: nn.Module) -> Params:
    """`params` with each computed weight in the place of what it is computed from, named as the architecture names it.

    Args:
        params: every entry of the model's snapshot.
        model: the model itself, which knows how its weights are computed.
    """
    plain, found = dict(params), parts(model)
    originals = {split_name(weight)[0]: (weight, part) for weight, part in found.items()}
    made: Params = {}
    for name, value in params.items():
        if name not in originals:
            made[name] = value
            continue
        weight, part = originals[name]
        start = split_name(weight)[1]
        own = {key: plain[start + key] for key, _ in part.named_parameters()}
        made[weight] = functional_call(copy.deepcopy(part).cpu(), own, (value,)).detach()
    extra = {split_name(weight)[1] + key for weight, part in found.items() for key, _ in part.named_parameters()}
    return {name: value for name, value in made.items() if name not in extra}


def named_in_file(model: nn.Module) -> dict[str, str]:
    """Names of a model's weights as its architecture has them -> the entries that hold their originals, where they differ."""
    return {weight: split_name(weight)[0] for weight in parts(model)}
