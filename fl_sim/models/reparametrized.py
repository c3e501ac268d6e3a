"""Weights that a model computes from a frozen original and a few trained parameters, and the way back to plain weights.

PyTorch names the parts of a weight `W` of the layer `L`: `L.parametrizations.W.original`, and `L.parametrizations.W.0.NAME`
for the parameters that it is computed with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from fl_sim.core.types import Params
from fl_sim.models.hugging_face import BASE, lora_layers, plain_weight

INSIDE, ORIGINAL, FIRST = ".parametrizations.", ".original", ".0."


class Reparametrized(nn.Module):
    """Computes a weight from its frozen original and parameters of its own; a module for `parametrize`."""

    sparse: tuple[str, ...] = ()
    """Own parameters that may travel sparse and in other value types, as weight matrices do."""

    def first(self, weight: Tensor) -> Params:
        """First values of own parameters that follow from the original weight, by name."""
        return {}


def compute(layer: nn.Module, name: str, part: Reparametrized) -> None:
    """Let a part compute a weight of a layer from here on.

    A recurrent layer keeps a list of its weights beside its parameters, for its kernel: the list is read anew too.
    """
    parametrize.register_parametrization(layer, name, part)
    if isinstance(layer, nn.RNNBase):
        own = type(layer)  # `parametrize` made a class for this layer alone
        own._flat_weights = property(_flat_weights, _nothing)  # type: ignore[assignment]
        own._update_flat_weights = own.flatten_parameters = _nothing  # type: ignore[assignment, method-assign]
        layer.__dict__.pop("_flat_weights", None)


def _flat_weights(layer: nn.RNNBase) -> list[Tensor]:
    return [getattr(layer, name) for name in layer._flat_weights_names]


def _nothing(layer: nn.Module, *ignored: object) -> None:
    """In the place of what would keep computed weights beyond their forward pass."""


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


@dataclass(frozen=True)
class Held:
    """An entry of the architecture that a model holds under another name.

    Attributes:
        original: that name: of the entry itself, or of the frozen weight that it is computed from.
        start: what the names of the parameters begin with that it is computed with; None = it is not computed.
        own: those parameters: name in the part that computes -> entry of the model.
        value: (own parameters by their name in the part, original) -> the entry.
    """

    original: str
    start: str | None = None
    own: Mapping[str, str] = field(default_factory=dict)
    value: Callable[[Params, Tensor], Tensor] = lambda own, original: original


def held(model: nn.Module) -> dict[str, Held]:
    """Name of each entry as the architecture has it -> where the model holds it, where that is elsewhere."""
    found = {}
    for weight, part in parts(model).items():
        original, start = split_name(weight)
        own = {name: start + name for name, _ in part.named_parameters()}
        found[weight] = Held(original, start, own, partial(_computed, part))
    for path, layer in lora_layers(model):
        for name, _ in layer.get_submodule("base_layer").named_parameters():
            found[f"{path}.{name}"] = Held(f"{path}{BASE}{name}")
        own = {name: f"{path}.{name}" for name, _ in layer.named_parameters() if name.startswith("lora_")}
        weight = f"{path}.weight"
        found[weight] = Held(found[weight].original, f"{path}.lora_", own, partial(plain_weight, layer))
    return found


def _computed(part: Reparametrized, own: Params, original: Tensor) -> Tensor:
    made: Tensor = functional_call(copy.deepcopy(part).cpu(), own, (original,))
    return made.detach()


def merged(params: Params, *, model: nn.Module) -> Params:
    """`params` with each computed weight in the place of what it is computed from, named as the architecture names it.

    Args:
        params: every entry of the model's snapshot.
        model: the model itself, which knows how its weights are computed.
    """
    places = held(model)
    names = {place.original: name for name, place in places.items()}
    beside = {entry for place in places.values() for entry in place.own.values()}
    made: Params = {}
    for entry, value in params.items():
        if entry in names:
            place = places[names[entry]]
            made[names[entry]] = place.value({name: params[own] for name, own in place.own.items()}, value)
        elif entry not in beside:
            made[entry] = value
    return made


def named_in_file(model: nn.Module) -> dict[str, str]:
    """Names of a model's entries as its architecture has them -> those of the model, where they differ."""
    return {name: place.original for name, place in held(model).items()}
