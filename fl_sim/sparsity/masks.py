"""Masks: exact top-k and operations on masks. Ties are broken by position, so counts are always exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fl_sim.core.types import FlatMask, Mask, Params, Scores, UserError
from fl_sim.sparsity.selection import CHUNK, are_few, top, top_of_few


def topk_mask(scores: Scores, keep: Mapping[str, int]) -> Mask:
    """Masks with exactly `keep[name]` true coordinates: the highest scores, ties to the lowest flat index.

    Linear time. The masks have the scores' shapes and device.

    Raises:
        UserError: a name without a count, a count outside 0..numel, a negative score or NaN.
    """
    for name, score in scores.items():
        if not 0 <= keep.get(name, -1) <= score.numel():
            raise UserError(f"keep[{name!r}] = {keep.get(name)}: must be from 0 to {score.numel()}")
    return {name: _top_mask(score, keep[name]) for name, score in scores.items()}


def _top_mask(score: Tensor, k: int) -> Tensor:
    if k == score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    if are_few([score]):
        return top_of_few([score], k).view(score.shape)
    selection = top(score, k)
    comparable = score if score.dtype.is_floating_point else score.double()
    mask = (comparable > selection.threshold).contiguous()
    left = selection.ties
    # Chunk by chunk: after pruning, nearly everything is equal to zero, and its positions would outweigh the weights.
    for values, part in zip(comparable.reshape(-1).split(CHUNK), mask.view(-1).split(CHUNK), strict=True):
        if not left:
            break
        first = (values == selection.threshold).nonzero()[:left, 0]
        part[first] = True
        left -= len(first)
    return mask


def apply_mask(params: Params, mask: Mask) -> Params:
    """Parameters with pruned coordinates at 0.0; names without a mask are passed on. Nothing is mutated."""
    return {name: torch.where(mask[name], value, 0.0) if name in mask else value for name, value in params.items()}


def density(mask: Mask) -> float:
    """Share of true coordinates; 0.0 for a mask of nothing."""
    return alive(mask) / max(1, size(mask))


def layer_densities(mask: Mask) -> dict[str, float]:
    """Share of true coordinates of each tensor that has any."""
    return {name: count / size for name, count, size in _counts(mask) if size}


def alive(mask: Mask) -> int:
    """Number of true coordinates."""
    return sum(count for _, count, _ in _counts(mask))


def _counts(mask: Mask) -> Iterator[tuple[str, int, int]]:
    """(name, true coordinates, all of them) of each tensor; of a flat mask without making its views."""
    if not (isinstance(mask, FlatMask) and mask.whole and mask.flat.is_cpu):
        yield from ((name, int(part.count_nonzero()), part.numel()) for name, part in mask.items())
        return
    flat, at = mask.flat.numpy(), 0
    for name, size in zip(mask.names, mask.sizes, strict=True):
        yield name, int(np.count_nonzero(flat[at : at + size])), size
        at += size


def size(tensors: Mapping[str, Tensor]) -> int:
    """Count the elements of all tensors."""
    return sum(t.numel() for t in tensors.values())


def intersect(first: Mask, second: Mask) -> Mask:
    """Alive in both. Raises UserError unless both have the same names."""
    if first.keys() != second.keys():
        raise UserError(f"masks of different parameters: only one of them has {sorted(first.keys() ^ second.keys())}")
    return {name: first[name] & second[name] for name in first}


def prune_and_grow(mask: Mask, drop: Scores, grow: Scores, fraction: float) -> Mask:
    """Exchange a share of every tensor's alive coordinates (SET, Mocanu et al., 2018; RigL, Evci et al., 2020).

    Every tensor's density is unchanged, and exactly twice the exchanged number of coordinates differ: RigL's published
    rule lets a coordinate that was just dropped return at once, ours does not.

    Args:
        mask: current mask.
        drop: the lowest of these among the alive are dropped; non-negative; equal ones from the end.
        grow: the highest of these among the dead are grown; non-negative; equal ones from the start.
        fraction: share of the alive coordinates that is exchanged, 0..1, rounded down, at most what is dead.

    Raises:
        UserError: a fraction outside 0..1, a negative score or NaN.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"fraction = {fraction}: must be from 0 to 1")
    made = {}
    for name, kept in mask.items():
        count = int(kept.count_nonzero())
        exchanged = min(int(fraction * count), kept.numel() - count)
        made[name] = _top_within(drop[name], kept, count - exchanged) | _top_within(grow[name], ~kept, exchanged)
    return made


def _top_within(score: Tensor, where: Tensor, count: int) -> Tensor:
    """The `count` highest scores among the coordinates `where`, ties to the lowest index."""
    chosen = torch.zeros_like(where)
    chosen[where] = _top_mask(score[where], count)
    return chosen
