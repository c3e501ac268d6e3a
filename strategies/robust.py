"""Aggregation that a minority of bad clients cannot bend far, over updates that each cover other coordinates.

    aggregate = ClipNorm(10.0, Trimmed(0.2))     # composes: clip each change, then trim each coordinate

Non-finite values never reach an aggregate: the decoder refuses them, always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fl_sim.codecs import Schema
from fl_sim.core.types import Params, Update, UserError
from strategies.aggregation import mean
from strategies.reading import ReadOnce
from strategies.server_step import Aggregate, ServerState


@dataclass(frozen=True)
class ClipNorm:
    """Scale each update's change down to L2 norm `bound` (Sun et al., 2019, arXiv 1911.07963), then aggregate.

    The norm is over the parameters that the client sent; BatchNorm statistics are neither in it nor scaled. An update
    within the bound passes bit for bit.
    """

    bound: float
    aggregate: Aggregate = mean

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise UserError(f"strategy.clip = {self.bound}: must be positive")

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        return self.aggregate(state, ReadOnce(self._clipped(state, update) for update in updates))

    def _clipped(self, state: ServerState, update: Update) -> Update:
        old = state.schema.flat(state.params)
        change = torch.where(counted(state.schema, update), state.schema.flat(update.params) - old, 0.0)
        norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        if norm <= self.bound:
            return update
        params = torch.where(is_statistic(state.schema), state.schema.flat(update.params), old)
        return replace(update, params=state.schema.view(params.add_(change, alpha=self.bound / norm)))


def counted(schema: Schema, update: Update) -> Tensor:
    """Flat bool: the parameters (no BatchNorm statistics) that an update sent."""
    sent = ~is_statistic(schema)
    if update.mask is not None:
        sent[: schema.prunable_size] = schema.flat_mask(update.mask)
    return sent


@lru_cache(maxsize=8)
def _statistics(schema: Schema) -> Tensor:
    kinds = zip(schema.kinds, schema.numels, strict=True)
    return torch.cat([torch.full((size,), kind == "buffers") for kind, size in kinds])


def is_statistic(schema: Schema) -> Tensor:
    """Flat bool: BatchNorm statistics; a copy."""
    return _statistics(schema).clone()


PIECE = 1 << 16
"""Coordinates of all clients that are sorted together."""

Pick = Callable[[Tensor, Tensor], Tensor]
"""(values (K, n) float32, sorted along clients, +inf where absent; how many are present (n,) int64) -> (n,) float64.
Where none is present, anything."""


def coordinatewise(state: ServerState, updates: Iterable[Update], pick: Pick) -> Params:
    """Choose every coordinate from the sorted values of the clients that sent it; one nobody sent keeps its value.

    All updates are kept in memory until the last has come: O(cohort x model).
    """
    schema, kept = state.schema, list(_flat(state.schema, updates))
    if not kept:
        return state.params
    result = schema.flat(state.params).clone()
    for start in range(0, schema.size, PIECE):
        piece = result[start : start + PIECE]
        sent = torch.stack([_part(alive, start, len(piece)) for _, alive in kept])
        values = torch.stack([flat[start : start + PIECE] for flat, _ in kept])
        values = torch.where(sent, values, torch.inf).sort(dim=0).values
        counts = sent.sum(dim=0)
        torch.where(counts > 0, pick(values, counts).float(), piece, out=piece)
    return schema.view(result)


def _flat(schema: Schema, updates: Iterable[Update]) -> Iterator[tuple[Tensor, Tensor | None]]:
    for update in updates:
        yield schema.flat(update.params), None if update.mask is None else schema.flat_mask(update.mask)


def _part(alive: Tensor | None, start: int, length: int) -> Tensor:
    """A piece of a mask, alive where there is none and outside the prunable tensors."""
    part = torch.ones(length, dtype=torch.bool)
    if alive is not None and start < len(alive):
        known = alive[start : start + length]
        part[: len(known)] = known
    return part


def _median(values: Tensor, counts: Tensor) -> Tensor:
    last = (counts - 1).clamp(min=0)
    low, high = values.gather(0, (last // 2)[None])[0], values.gather(0, ((last + 1) // 2)[None])[0]
    return (low.double() + high.double()) / 2


def coordinate_median(state: ServerState, updates: Iterable[Update]) -> Params:
    """Median of each coordinate over the clients that sent it (Yin et al., 2018, definition 1); every client counts once.

    The middle two are averaged when there is an even number. Numbers of examples are ignored, because a
    client that attacks may claim any.
    """
    return coordinatewise(state, updates, _median)


@dataclass(frozen=True)
class Trimmed:
    """Mean of each coordinate without its `share` largest and smallest values (Yin et al., 2018, definition 2).

    Of c clients that sent a coordinate, floor(share c) are left out at either end; every other counts once.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise UserError(f"strategy.trim = {self.share}: must be at least 0 and below 0.5")

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        return coordinatewise(state, updates, self._mean)

    def _mean(self, values: Tensor, counts: Tensor) -> Tensor:
        cut = (self.share * counts.double()).floor()
        rank = torch.arange(len(values), dtype=torch.float64)[:, None]
        kept = (rank >= cut) & (rank < counts - cut)
        return torch.where(kept, values.double(), 0.0).sum(dim=0) / (counts - 2 * cut)
