"""LotteryFL (Li et al., 2020, arXiv 2008.03371): each client finds a winning ticket, and trains and sends that sub-network alone.

A client that reaches the accuracy `threshold` on its own samples with the received weights under its mask, and has more than
`1 - share` of the weights left, prunes the `rate` share of those left with the smallest magnitude and puts the others back to
their first values (the lottery ticket hypothesis; Frankle and Carbin, 2019). It trains under the mask. The server takes, for
each weight, the mean over the clients whose ticket has it, which is the default aggregate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.local import LocalClient
from clients.transformed import Through, Transform
from fl_sim.core.types import Mask, Params, Task, Update, UserError
from fl_sim.models import prunable_names
from fl_sim.models.parameters import load
from fl_sim.sparsity import apply_mask, global_topk, magnitude, topk_mask
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.evaluation import evaluate
from fl_sim.training.loop import Training

KEPT, FIRST = "ticket.", "first."
"""What the names of a client's kept masks and first weights begin with."""


@dataclass(frozen=True)
class Ticket:
    """A client's mask, kept in its state, and when it shrinks.

    Attributes:
        threshold: accuracy on the client's own samples from which its mask shrinks.
        rate: share of the weights left that goes each time.
        share: share of all weights that may go.
    """

    threshold: float
    rate: float
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or not 0 <= self.share < 1 or not 0 <= self.threshold <= 1:
            given = f"threshold = {self.threshold}, rate = {self.rate}, share = {self.share}"
            raise UserError(f"client: {given}: must be from 0 to 1, above 0 and below 1, from 0 to below 1")

    def shrunk(self, mask: Mask, weights: Params) -> Mask:
        """The mask without the smallest weights that it has left, never beyond `share`."""
        alive, size = sum(int(kept.sum()) for kept in mask.values()), sum(kept.numel() for kept in mask.values())
        share = max((1 - self.rate) * alive / size, 1 - self.share)
        scores = magnitude(apply_mask(weights, mask))
        return topk_mask(scores, global_topk(scores, share))

    def __call__(self, task: Task, ctx: ClientContext) -> tuple[Mask, Params]:
        """(mask of this round, weights to begin with); keeps the mask and, in its first round, the weights that it received."""
        names = [name for name in task.params if name in prunable_names(ctx.model)]
        weights = {name: task.params[name] for name in names}
        for name, value in weights.items():
            ctx.state.setdefault(FIRST + name, value.clone())
            ctx.state.setdefault(KEPT + name, torch.ones_like(value))
        mask: Mask = {name: ctx.state[KEPT + name] > 0 for name in names}
        start = apply_mask(weights, mask)
        left = sum(int(kept.sum()) for kept in mask.values()) / sum(kept.numel() for kept in mask.values())
        measured = evaluate(load(ctx.model, {**task.params, **start}), ctx.data, ctx.loss)
        if "accuracy" not in measured:
            raise UserError("client: a ticket shrinks by accuracy; needed: a task that has one, such as classification")
        if left > 1 - self.share and measured["accuracy"] >= self.threshold:
            mask = self.shrunk(mask, weights)
            start = apply_mask({name: ctx.state[FIRST + name] for name in names}, mask)
            ctx.state.update({KEPT + name: kept.float() for name, kept in mask.items()})
        return mask, start


@dataclass(frozen=True)
class TicketClient:
    """A client that trains and uploads its ticket."""

    ticket: Ticket
    training: Training

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        """Shrink the ticket where it is due, then train."""
        mask, start = self.ticket(task, ctx)

        def under(task: Task, ctx: ClientContext) -> Transform:
            load(ctx.model, start)
            return lambda params: {name: torch.where(mask[name], value, 0.0) for name, value in params.items()}

        return LocalClient(self.training, loss=Through(under), upload=lambda task, params: mask)(task, ctx)


def client(*, training: Training, threshold: float = 0.5, rate: float = 0.2, share: float = 0.5) -> Client:
    """LotteryFL's client.

    Args:
        training: the config's `[training]` table.
        threshold: accuracy on the client's own samples from which its mask shrinks, from 0 to 1.
        rate: share of the weights left that goes each time, above 0 and below 1.
        share: share of all weights that may go, from 0 to below 1.
    """
    return TicketClient(Ticket(threshold, rate, share), training)
