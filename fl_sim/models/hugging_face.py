"""Models of Hugging Face's transformers, and LoRA on them by its peft library: neither is imported where no such model is built."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fl_sim.core.errors import in_one_line
from fl_sim.core.process_state import seeded
from fl_sim.core.types import Params, UserError

if TYPE_CHECKING:
    from fl_sim.models.adapters import Adapter

NAME = "default"
"""What peft calls the adapter of a model that has one."""
BASE = ".base_layer."
"""Between the name of a layer that peft has wrapped and that of its parameter."""


class Logits(nn.Module):
    """A model of transformers whose answer is the tensor `logits`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits  # type: ignore[no-any-return]


def pretrained(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each outermost model of transformers in a model."""
    kind = _loaded("transformers.modeling_utils", "PreTrainedModel")
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if (
            kind is not None
            and isinstance(module, kind)
            and not any(name.startswith(f"{outer}.") or not outer for outer, _ in found)
        ):
            found.append((name, module))
    return found


def _loaded(module: str, name: str) -> type[nn.Module] | None:
    """A class of a module that somebody has imported; None where nobody has, so that there is no object of it."""
    return getattr(sys.modules.get(module), name, None)


def answering(model: object) -> object:
    """A model of transformers with its logits as the answer; anything else as it is."""
    is_one = isinstance(model, nn.Module) and any(not name for name, _ in pretrained(model))
    return Logits(cast(nn.Module, model)) if is_one else model


def peft_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of layers of transformers' models that peft may give an adapter: matrices, filters and embeddings, by name.

    Weights that layers share are left out: peft would adapt them in one layer alone.
    """
    found: dict[str, Tensor] = {}
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for start, part in pretrained(model):
        for path, layer in part.named_modules():
            weight = layer._parameters.get("weight")
            if weight is not None and weight.dim() > 1 and users[id(weight)] == 1:
                found[f"{start}.{path}.weight".removeprefix(".")] = weight
    return found


def adapt_by_peft(
    model: nn.Module, adapter: Adapter, targets: list[str] | None, full: set[str], seed: int
) -> list[str]:
    """Put peft's LoRA layers into the models of transformers that a model holds; what they wrap is frozen already.

    Args:
        model: changed in place.
        adapter: rank and alpha.
        targets: names of weights; None = those that peft has for the architecture, without those of `full`.
        full: weights that are trained in full.
        seed: draws A.

    Returns:
        Names of the weights that have an adapter.

    Raises:
        UserError: peft is not installed, it knows no layers of the architecture, or it refuses one.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "model.adapter: adapters on a model of transformers are peft's; pip install 'fl-sim[peft]'"
        ) from None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for start, part in pretrained(model):
        inside = f"{start}." if start else ""
        mine = None if targets is None else _layers([t for t in targets if t.startswith(inside)], inside)
        kept = _layers(full, inside)
        options = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
            target_modules=mine,
            exclude_modules=kept,
        )
        try:
            with seeded(seed), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fan_in_fan_out")  # which peft sets right itself
                inject_adapter_in_model(options, part)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"model.adapter: peft on {type(part).__name__}: {in_one_line(error)}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.replace(BASE, ".") in trained)
    for _, layer in lora_layers(model):
        for matrices in (layer.lora_A, layer.lora_B):
            vars(matrices)["beside_the_path"] = True  # none of them is the model's head
    return [f"{name}.weight" for name, _ in lora_layers(model)]


def _layers(weights: Iterable[str], inside: str) -> str | None:
    """A pattern that the names of these weights' layers match as a whole; None where there are none."""
    names = [re.escape(name.removeprefix(inside).rpartition(".")[0]) for name in weights]
    return "|".join(names) if names else None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and layer of each layer that peft has wrapped."""
    kind = _loaded("peft.tuners.lora", "LoraLayer")
    return ((name, layer) for name, layer in model.named_modules() if kind is not None and isinstance(layer, kind))


def plain_weight(layer: nn.Module, own: Params, original: Tensor) -> Tensor:
    """The weight of a layer that peft has wrapped, with parameters of these values: those of the layer by name, and its base's."""
    made = copy.deepcopy(layer).cpu()
    named = dict(made.named_parameters())
    with torch.no_grad():
        for name, value in own.items():
            named[name].copy_(value)
        delta: Tensor = made.get_delta_weight(NAME)  # type: ignore[operator]
    return original + delta.to(original.dtype)
