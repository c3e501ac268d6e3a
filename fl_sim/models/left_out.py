"""Weights that pruning, top-k uploads and value types leave out, because the model computes them from other tensors."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from fl_sim.models.computed import chains
from fl_sim.models.layers import as_entries, is_weight
from fl_sim.models.parameters import computed_by_hooks

NAMED = 3
"""Weights that a line names; of the rest it gives the number."""


def left_out(model: nn.Module, travelling: Collection[str], prunable: Collection[str]) -> dict[str, int]:
    """Weight matrix -> its size, of those computed from entries that travel and of which none is prunable itself."""
    found = {}
    for name, value, sources in _computed(model):
        entries = as_entries(model, sources)
        if not set(travelling).isdisjoint(entries) and set(prunable).isdisjoint(entries):
            found[name] = value.numel()
    return found


def share_left_out(found: Mapping[str, int], prunable_size: int, fate: str) -> str:
    """Half a sentence: how many of all weights take no part, why, what happens to them, and their first names."""
    count, names = sum(found.values()), list(found)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return (
        f"{count:,} of {count + prunable_size:,} weights take no part, as the model computes them from other tensors, which "
        f"{fate}: {', '.join(names[:NAMED])}{more}"
    )


def _computed(model: nn.Module) -> Iterator[tuple[str, Tensor, list[str]]]:
    """(name, value, names of the parameters that it is computed from) of each computed weight matrix, in module order."""
    for path, layer in model.named_modules():
        start = f"{path}.".removeprefix(".")
        found: list[tuple[str, Tensor, str]] = []
        for name, chain in chains(layer).items():
            # A copy in evaluation mode, as looking at it moves a spectral norm's singular vectors.
            with torch.no_grad():
                found.append((name, copy.deepcopy(chain).eval()(), f"parametrizations.{name}."))
        found += [(name, getattr(layer, name), f"{name}_") for name in computed_by_hooks(layer)]
        for name, value, prefix in found:
            if is_weight(layer, name, value):
                own = [f"{start}{each}" for each, _ in layer.named_parameters() if each.startswith(prefix)]
                yield f"{start}{name}", value, own
