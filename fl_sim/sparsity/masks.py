"""Which ones: exact top-k masks and operations on masks.

Selection is by threshold, found without sorting everything, with ties broken by position, so that a mask has exactly
the requested number of coordinates even when scores are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_sim.types import Mask, Params, Scores

PASSES = ((16, 0), (0, 16))


@dataclass(frozen=True)
class Selection:
    """The chosen part of one tensor: everything above `threshold`, and the first `ties` coordinates equal to it."""

    threshold: float
    ties: int
    count: int


def select(tensors: Sequence[Tensor], k: int) -> list[Selection]:
    """The k highest of several non-negative 1-D tensors together; ties go to the earlier tensor, then the lower index.

    Linear time and constant extra memory: non-negative float32 numbers are ordered like their bit patterns, so two
    histograms of 16 bits each find the k-th value exactly. Other dtypes are compared as they are, by `kthvalue`.
    """
    total = sum(t.numel() for t in tensors)
    if not 0 <= k <= total:
        raise ValueError(f"cannot choose {k} of {total}")
    if k == 0:
        return [Selection(float("inf"), 0, 0) for _ in tensors]
    if k == total:
        return [Selection(-1.0, 0, t.numel()) for t in tensors]
    threshold = _kth_largest(tensors, k)
    above = [int((t > threshold).sum()) for t in tensors]
    equal = [int((t == threshold).sum()) for t in tensors]
    left = k - sum(above)
    made = []
    for more, same in zip(above, equal, strict=True):
        ties = min(left, same)
        left -= ties
        made.append(Selection(threshold, ties, more + ties))
    return made


def _kth_largest(tensors: Sequence[Tensor], k: int) -> float:
    if any(t.dtype != torch.float32 for t in tensors):
        joined = torch.cat([t.double() for t in tensors])
        return float(joined.kthvalue(joined.numel() - k + 1).values)
    high, k = _radix(tensors, k, prefix=None)
    low, _ = _radix(tensors, k, prefix=high)
    return float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32))


def _radix(tensors: Sequence[Tensor], k: int, *, prefix: int | None) -> tuple[int, int]:
    """(16 bits of the k-th largest value, rank left below them): the upper bits, or the lower ones under `prefix`."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for tensor in tensors:
        for chunk in tensor.split(1 << 20):
            # Adding 0.0 turns -0.0 into 0.0, whose pattern is ordered like the others.
            bits = (chunk + 0.0).contiguous().view(torch.int32)
            digits = bits >> 16 if prefix is None else bits[(bits >> 16) == prefix] & 0xFFFF
            counts += torch.bincount(digits.long(), minlength=1 << 16).cpu()
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    before = int(from_top[position - 1]) if position else 0
    return (1 << 16) - 1 - position, k - before


def topk_mask(scores: Scores, keep: Mapping[str, int]) -> Mask:
    """Masks with exactly `keep[name]` true coordinates: the highest scores, ties to the lowest flat index."""
    return {name: _mask(score, select([score.reshape(-1)], keep[name])[0]) for name, score in scores.items()}


def _mask(score: Tensor, selection: Selection) -> Tensor:
    if selection.count == score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    mask = score > selection.threshold
    if selection.ties:
        flat = mask.view(-1)
        flat[(score.reshape(-1) == selection.threshold).nonzero()[: selection.ties, 0]] = True
    return mask


def apply_mask(params: Params, mask: Mask) -> Params:
    """Parameters with pruned coordinates at 0.0; names without a mask are passed on. Nothing is mutated."""
    return {name: torch.where(mask[name], value, 0.0) if name in mask else value for name, value in params.items()}


def density(mask: Mask) -> float:
    """Share of true coordinates."""
    return sum(int(m.sum()) for m in mask.values()) / max(1, sum(m.numel() for m in mask.values()))


def intersect(first: Mask, second: Mask) -> Mask:
    """Alive in both."""
    return {name: first[name] & second[name] for name in first}


def prune_and_grow(mask: Mask, drop: Scores, grow: Scores, fraction: float) -> Mask:
    """Exchange a share of every tensor's alive coordinates, density unchanged (SET, Mocanu et al., 2018; RigL, Evci et al., 2020).

    Args:
        mask: current mask.
        drop: the lowest of these among the alive are dropped.
        grow: the highest of these among the dead are grown; what was just dropped may not return at once.
        fraction: share of the alive coordinates that is exchanged, rounded down, at most what is dead.
    """
    made = {}
    for name, alive in mask.items():
        kept = int(alive.sum())
        count = min(int(fraction * kept), alive.numel() - kept)
        lasting = _top_within(drop[name], alive, kept - count)
        made[name] = lasting | _top_within(grow[name], ~alive, count)
    return made


def _top_within(score: Tensor, where: Tensor, count: int) -> Tensor:
    """The `count` highest scores among the coordinates `where`, ties to the lowest index."""
    chosen = torch.zeros_like(where)
    chosen[where] = topk_mask({"": score[where]}, {"": count})[""]
    return chosen
