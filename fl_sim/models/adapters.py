"""LoRA: low-rank adapters beside frozen weights (Hu et al., 2021, arXiv 2106.09685, section 4.1).

    adapt(model, Adapter(rank=8), seed=0)      # W = W0 + alpha / rank * B A: only A and B require a gradient

A (rank, columns) starts Kaiming-uniform and B (rows, rank) at zero, so that the model starts as its base. A weight is taken
as a matrix of its first dimension by all others: filters of a convolution are its rows, tokens those of an embedding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fl_sim.core.types import UserError
from fl_sim.models.hugging_face import adapt_by_peft, peft_weights, pretrained
from fl_sim.models.layers import CONVOLUTION, RECURRENT
from fl_sim.models.parameters import FLOATS
from fl_sim.models.reparametrized import Reparametrized, compute
from fl_sim.models.trainable import freeze

ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights of `nn.MultiheadAttention` itself; its output projection is a linear layer."""
ON_REQUEST = (nn.Embedding, *RECURRENT)
"""Layers whose weights have adapters only where `targets` names them."""
Holders = list[tuple[nn.Module, str]]
"""Modules that use one weight, each with the attribute by which it does."""


LEAST_ALPHA, MOST_ALPHA = 1e-6, 1e6
"""Beyond, the product vanishes beside the weight in float32, or is all of it."""


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters beside frozen weights (LoRA): only they are trained and sent.

    Attributes:
        kind: "lora".
        rank: columns of B and rows of A, at least 1 and at most the smaller side of a weight.
        alpha: the product B A is scaled by alpha / rank; unset = the rank, a scale of 1.
        targets: globs over names of weights or of their layers, such as `blocks.*.qkv`; empty = all weights of linear,
            convolution and attention layers that `train` does not name.
        train: what is trained and sent in full beside the adapters: head, norm, batchnorm or a glob, several joined by `+`.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    train: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"model.adapter.kind = {self.kind!r}: allowed: {', '.join(KINDS)}")
        if self.rank < 1:
            raise UserError(f"model.adapter.rank = {self.rank}: must be at least 1")
        if self.alpha is not None and not LEAST_ALPHA <= self.alpha <= MOST_ALPHA:
            raise UserError(f"model.adapter.alpha = {self.alpha}: must be from {LEAST_ALPHA:g} to {MOST_ALPHA:g}")
        if self.train == "all":
            raise UserError("model.adapter.train = 'all': leaves nothing for adapters; allowed: head, norm, a glob")

    @property
    def scale(self) -> float:
        """What the product B A is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LowRank(Reparametrized):
    """A weight plus `scale` times B A, of shape (rows, rank) and (rank, columns)."""

    sparse = ("lora_a", "lora_b")

    def __init__(self, weight: Tensor, adapter: Adapter, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        bound = 1 / math.sqrt(columns)  # Kaiming-uniform with a = sqrt(5), as PyTorch's linear layers
        self.scale = adapter.scale
        self.lora_a = nn.Parameter(torch.empty(adapter.rank, columns).uniform_(-bound, bound, generator=generator))
        self.lora_b = nn.Parameter(torch.zeros(rows, adapter.rank))

    def forward(self, weight: Tensor) -> Tensor:
        change = torch.mm(self.lora_b, self.lora_a).view(weight.shape)
        return torch.add(weight, change, alpha=self.scale).to(weight.dtype)


KINDS: Mapping[str, Callable[[Tensor, Adapter, torch.Generator], Reparametrized]] = {"lora": LowRank}


def adapt(model: nn.Module, adapter: Adapter, *, seed: int = 0) -> list[str]:
    """Freeze a model, and put adapters beside the weights that are targeted.

    A weight that several layers share has one adapter. Layers of a model of transformers get peft's.

    Args:
        model: changed in place; parameters on the CPU, so that every machine draws the same bits.
        adapter: which, and how large.
        seed: draws A.

    Returns:
        Names of the weights that have an adapter, in model order; peft's come last.

    Raises:
        UserError: a target selects nothing or what has no adapters, a rank above that of a weight, or peft is needed and is not
            installed.
    """
    full = [] if adapter.train is None else freeze(model, adapter.train, seed=seed, key="model.adapter.train")
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(name in full)
    theirs = {name: weight for name, weight in peft_weights(model).items() if name not in full}
    weights, generator = _targeted(model, adapter, set(full), theirs), torch.Generator().manual_seed(seed)
    chosen = None if not adapter.targets else [name for name in weights if name in theirs]
    ours = {name: holders for name, holders in weights.items() if name not in theirs}
    for name, holders in ours.items():
        weight = named[name]
        _check_rank(adapter, name, weight)
        part = KINDS[adapter.kind](weight.detach(), adapter, generator)
        for layer, attribute in holders:
            compute(layer, attribute, part)
    if not theirs or chosen == []:
        return list(ours)
    made = adapt_by_peft(model, adapter, chosen, set(full), seed)
    for name in made:
        _check_rank(adapter, name, theirs[name])
    return [*ours, *made]


def left_frozen(model: nn.Module) -> list[str]:
    """Linear, convolution and attention layers of an adapted model in which nothing is trained, by name.

    Without `targets` these are the layers whose weight something else computes or uses too, such as PyTorch's `weight_norm`.
    Parts of transformers' models are peft's, and not looked at.
    """
    inside = {id(module) for _, part in pretrained(model) for module in part.modules()}
    return [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.MultiheadAttention, *CONVOLUTION))
        and id(layer) not in inside
        and not any(parameter.requires_grad for parameter in layer.parameters())
    ]


def _check_rank(adapter: Adapter, name: str, weight: Tensor) -> None:
    if adapter.rank > (most := min(len(weight), weight[0].numel())):
        raise UserError(
            f"model.adapter.rank = {adapter.rank}: {name!r} has shape {tuple(weight.shape)}, of rank at most {most}; "
            "lower the rank, or name model.adapter.targets without it"
        )


def _targeted(model: nn.Module, adapter: Adapter, full: set[str], theirs: Mapping[str, Tensor]) -> dict[str, Holders]:
    """Name of each weight that gets an adapter -> the layers that use it; none are said of `theirs`, which are peft's."""
    inside = [id(module) for _, part in pretrained(model) for module in part.modules()]
    weights = {
        name: holders
        for name, holders in adaptable(model).items()
        if name not in full and not any(id(layer) in inside for layer, _ in holders)
    }
    if not adapter.targets:
        chosen = {n: h for n, h in weights.items() if not isinstance(h[0][0], ON_REQUEST)}
        if not chosen and not theirs:
            raise UserError(
                f"model.adapter: this model has no linear, convolution or attention layer for adapters; {_allowed(weights)}"
            )
        return chosen
    weights |= {name: [] for name in theirs}
    found: set[str] = set()
    for target in adapter.targets:
        if not (selected := {name for name in weights if _matches(name, target)}):
            raise UserError(
                f"model.adapter.targets: {target!r} selects no weight that can have an adapter; {_allowed(weights)}"
            )
        found |= selected
    return {name: holders for name, holders in weights.items() if name in found}


def adaptable(model: nn.Module) -> dict[str, Holders]:
    """Name of each weight that can have an adapter -> the layers that use it: of linear, embedding, convolution, attention
    and recurrent layers, unless something computes the weight already."""
    first: dict[int, str] = {}
    found: dict[str, Holders] = {}
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.MultiheadAttention, *ON_REQUEST, *CONVOLUTION)):
            continue
        for attribute in _matrices(layer):
            weight = layer._parameters.get(attribute)
            if weight is not None and weight.dtype in FLOATS and weight.numel():
                name = first.setdefault(id(weight), f"{path}.{attribute}".removeprefix("."))
                found.setdefault(name, []).append((layer, attribute))
    # A weight that a module of another kind uses too would be adapted in one of them alone.
    return {name: held for name, held in found.items() if len(held) == users[id(held[0][0]._parameters[held[0][1]])]}


def _matrices(layer: nn.Module) -> Sequence[str]:
    """Attributes of a layer's weight matrices."""
    if isinstance(layer, RECURRENT):
        return [name for name, value in layer._parameters.items() if value is not None and value.dim() > 1]
    return ATTENTION if isinstance(layer, nn.MultiheadAttention) else ("weight",)


def _matches(name: str, target: str) -> bool:
    """Whether a glob matches a weight's name, or that of its layer."""
    return fnmatchcase(name, target) or fnmatchcase(name.rpartition(".")[0], target)


def _allowed(weights: Mapping[str, Holders]) -> str:
    return f"allowed: {some_of(list(weights)) or 'none in this model'}"


def some_of(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
