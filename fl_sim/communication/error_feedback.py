"""Error feedback: what an upload leaves out of a client's change stays with the client and is added to its next change.

With the received parameters w, the trained parameters x, the residual e of the uploads before, and y, which the server
decodes (y = w where a coordinate did not travel):

    encoded:       x + e, under the mask that the client chose
    new residual:  e' = (x - w) + e - (y - w)

so that what is sent and what is kept add up to what was wanted: (y - w) + e' = (x - w) + e. Sums are of changes and not of
parameters, because a small residual is lost in the rounding of a parameter. Seide et al. (2014) carry over the error of
quantisation; Stich et al. (2018, algorithm 1) what top-k leaves out; Sattler et al. (2019, algorithm 2) both, in federated
learning. Only prunable parameters have a residual: everything else travels whole and exactly.

The server has to apply each change once: `strategies.aggregation.zero_fill` does. Two things are not carried over. A
coordinate that the global mask prunes loses its residual, since no later change of it can arrive. An upload that the
server never uses (rejected, late or lost on the way) is lost with what it carried, since the client is not told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_sim.communication.exchange import Exchange
from fl_sim.core.types import FlatParams, Mask, Params, Task, Update


@dataclass(frozen=True)
class ErrorFeedback:
    """Error feedback of one client in one round.

    Attributes:
        exchange: what travels and how.
        task: what the client received.
        residual: float32 over the prunable coordinates in schema order; None before the first upload.
    """

    exchange: Exchange
    task: Task
    residual: Tensor | None = None

    def __post_init__(self) -> None:
        if self.residual is not None:
            object.__setattr__(self, "residual", self._alive(self.residual))

    def corrected(self, params: Params) -> Params:
        """Prunable parameters of a client as they will be encoded: plus the residual. Other names pass as they are."""
        if self.residual is None:
            return params
        left = self.exchange.schema.prunable_part.view(self.residual)
        return {
            name: value if name not in left else value + left[name].to(value.device) for name, value in params.items()
        }

    def encoded(self, update: Update) -> Update:
        """The update to encode: its prunable parameters plus the residual; the client's own tensors stay as they are."""
        return update if self.residual is None else replace(update, params=self._plus(update.params, self.residual))

    def left_out(self, update: Update, sent: bytes) -> Tensor:
        """Compute the next residual, 1-D float32: the change that the client wanted, less the change in the payload `sent`.

        What the client wanted is the change in `update` plus the residual before.
        """
        schema, count = self.exchange.schema, self.exchange.schema.prunable_size
        trained, received = (schema.flat(params)[:count] for params in (update.params, self.task.params))
        left = trained - received
        if self.residual is not None:
            left += self.residual
        values, upload_mask = self._arrived(update, trained, sent)
        change = values - received
        if upload_mask is not None:
            change = torch.where(schema.flat_mask(upload_mask), change, 0.0)
        return self._alive(left.sub_(change))

    def _arrived(self, update: Update, trained: Tensor, sent: bytes) -> tuple[Tensor, Mask | None]:
        """The prunable values as the server decodes them; exact values under a mask of the client's own are what was encoded."""
        if self.exchange.uplink.is_exact and self.task.mask is None:
            return (trained if self.residual is None else trained + self.residual), update.mask
        params, upload_mask = self.exchange.decode_up(sent, self.task)
        return self.exchange.schema.flat(params)[: len(trained)], upload_mask

    def _plus(self, params: Params, residual: Tensor) -> FlatParams:
        flat = self.exchange.schema.flat(params).clone()
        flat[: residual.numel()].add_(residual)
        return self.exchange.schema.view(flat)

    def _alive(self, residual: Tensor) -> Tensor:
        """The residual, zero where the global mask is."""
        mask = self.task.mask
        return residual if mask is None else torch.where(self.exchange.schema.flat_mask(mask), residual, 0.0)


@dataclass(frozen=True)
class RowsFeedback:
    """`ErrorFeedback` of several clients that received the same, without a pruning mask: one row of a matrix for each, and the
    same bits.

    Attributes:
        received: the prunable parameters that all received, 1-D.
        residuals: of each client; None before its first upload.
    """

    received: Tensor
    residuals: Sequence[Tensor | None]

    def corrected(self, rows: Tensor) -> Tensor:
        """All values of the clients, the prunable ones first, plus the residuals: what is encoded."""
        known = [i for i, residual in enumerate(self.residuals) if residual is not None]
        if not known:
            return rows
        added = torch.stack([residual for residual in self.residuals if residual is not None])
        sums, count = rows.clone(), len(self.received)
        if len(known) == len(rows):
            sums[:, :count].add_(added)
        else:
            sums[known, :count] = rows[known, :count].add(added)
        return sums

    def left_out(self, rows: Tensor, arrived: Tensor, upload_masks: Tensor | None) -> Tensor:
        """The next residuals, of what was trained (`rows`) and what the server decodes; upload masks as rows over the prunable
        values. Of exact values under a mask, what was encoded does for what is decoded."""
        count = len(self.received)
        left = self.corrected(rows[:, :count] - self.received)
        change = arrived[:, :count] - self.received
        if upload_masks is not None:
            change = torch.where(upload_masks, change, 0.0)
        return left.sub_(change)
