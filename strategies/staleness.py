"""Stale updates: the change that a client made to an old model, moved to the current one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_sim.codecs import Schema
from fl_sim.communication.schedule import Schedule
from fl_sim.core import kernels
from fl_sim.core.types import Update
from strategies.robust import is_statistic
from strategies.server_step import ServerState


@dataclass
class Refresh:
    """Moves an update to the current model x, so that every aggregation rule can take it.

    With the client's parameters y, its base b and the weight w of its staleness:

        fedbuff, deadline:  x + w (y - b)        (FedBuff; Nguyen et al., 2022, algorithm 1, with Xie et al.'s weights)
        fedasync:           x + w (y - x)        (FedAsync; Xie et al., 2019, algorithm 1, w = mixing * weight)

    BatchNorm statistics are mixed in either case: a variance that changes were added to could become negative. An update that is
    not stale and has full weight stays as it is, bit for bit.
    """

    schedule: Schedule
    schema: Schema

    def __post_init__(self) -> None:
        self._mixed = is_statistic(self.schema) if any(self.schema.buffers) else None

    def __call__(self, update: Update, base: ServerState, current: ServerState, stale: int) -> Update:
        weight = self.schedule.weight(stale)
        if stale == 0 and weight == 1.0:
            return update
        flat = self.schema.flat
        moved = self._moved(flat(update.params), flat(base.params), flat(current.params), weight)
        return Update(self.schema.view(moved), update.num_examples, update.mask, update.metrics, update.extra)

    def _moved(self, y: Tensor, b: Tensor, x: Tensor, weight: float) -> Tensor:
        if self.schedule.kind == "fedasync":
            return torch.lerp(x, y, weight)
        moved = torch.empty_like(x)
        kernels.moved(moved.numpy(), y.numpy(), b.numpy(), x.numpy(), weight)
        return moved if self._mixed is None else torch.where(self._mixed, torch.lerp(x, y, weight), moved)


def same_mask(base: ServerState, current: ServerState) -> bool:
    """Whether two versions of the model have the same pruning mask."""
    if base.mask is None or current.mask is None or base.mask is current.mask:
        return base.mask is current.mask
    flat = base.schema.flat_mask
    return torch.equal(flat(base.mask), flat(current.mask))
