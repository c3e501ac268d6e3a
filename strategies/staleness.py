"""Stale updates: the change that a client made to an old model, moved to the current one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_sim.codecs import Schema
from fl_sim.communication.schedule import Schedule
from fl_sim.core import kernels
from fl_sim.core.types import Update
from strategies.aggregation import Around
from strategies.robust import ClipNorm, counted, is_statistic
from strategies.server_step import Aggregate, ServerState


@dataclass
class Refresh:
    """Moves an update to the current model x, so that every aggregation rule can take it.

    With the client's parameters y, its base b and the weight w of its staleness:

        fedbuff, deadline:  x + w (y - b)        (FedBuff; Nguyen et al., 2022, algorithm 1, with Xie et al.'s weights)
        fedasync:           x + w (y - x)        (FedAsync; Xie et al., 2019, algorithm 1, w = mixing * weight)

    BatchNorm statistics are mixed in either case: a variance that changes were added to could become negative. An update that is
    not stale and has full weight stays as it is, bit for bit.

    Attributes:
        clip: largest norm of y - b, or y - x, before it is weighed; the weight of an update is no leave for a longer change.
    """

    schedule: Schedule
    schema: Schema
    clip: float = math.inf

    def __post_init__(self) -> None:
        self._mixed = is_statistic(self.schema) if any(self.schema.buffers) else None

    def __call__(self, update: Update, base: ServerState, current: ServerState, stale: int) -> Update:
        weight = self.schedule.weight(stale)
        if stale == 0 and weight == 1.0:
            return update
        moved = self._moved(update, base, current, weight)
        return Update(self.schema.view(moved), update.num_examples, update.mask, update.metrics, update.extra)

    def _moved(self, update: Update, base: ServerState, current: ServerState, weight: float) -> Tensor:
        y, b, x = map(self.schema.flat, (update.params, base.params, current.params))
        mixes = self.schedule.kind == "fedasync"
        kept = self._kept(update, y, x if mixes else b)
        if mixes:
            moved = torch.lerp(x, y, weight * kept)
        else:
            moved = torch.empty_like(x)
            kernels.moved(moved.numpy(), y.numpy(), b.numpy(), x.numpy(), weight * kept)
        if self._mixed is None or (mixes and kept == 1.0):
            return moved
        return torch.where(self._mixed, torch.lerp(x, y, weight), moved)

    def _kept(self, update: Update, y: Tensor, start: Tensor) -> float:
        """The part of a change that the clip leaves."""
        if self.clip == math.inf:
            return 1.0
        change = torch.where(counted(self.schema, update), y - start, 0.0)
        norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        return 1.0 if norm <= self.clip else self.clip / norm


def clip_of(aggregate: Aggregate) -> float:
    """The smallest bound on the norm of a change in a rule and those that it is around; infinity where there is none."""
    bound = aggregate.bound if isinstance(aggregate, ClipNorm) else math.inf
    return min(bound, clip_of(aggregate.aggregate)) if isinstance(aggregate, Around) else bound


def same_mask(base: ServerState, current: ServerState) -> bool:
    """Whether two versions of the model have the same pruning mask."""
    if base.mask is None or current.mask is None or base.mask is current.mask:
        return base.mask is current.mask
    flat = base.schema.flat_mask
    return torch.equal(flat(base.mask), flat(current.mask))
