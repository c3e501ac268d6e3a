"""Nested sub-models: HeteroFL (Diao, Ding and Tarokh, 2021, arXiv 2010.01264) and FjORD (Horvath et al., 2021, arXiv 2102.13451).

The sub-model of ratio r has the first ceil(r C) of each layer's C channels (FjORD calls it Ordered
Dropout); the inputs of the first layer and the outputs of the last are whole. Client k has the ratio
`ratios[k mod len(ratios)]` and uploads its sub-model. The server takes, for each weight, the mean over the clients that have
it, which is the default aggregate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.local import LocalClient
from clients.transformed import Through, Transform
from fl_sim.core.seeding import derive
from fl_sim.core.types import Mask, Params, Task, Update, UserError
from fl_sim.models.layers import prunable_names, row_blocks
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training

STEPS = 41
"""Last element of the key from which FjORD draws the width of a step."""


def nested_mask(params: Params, ratio: float, blocks: Mapping[str, int]) -> Mask:
    """The sub-model of a ratio, of weight matrices in the order of the layers; `blocks` as `row_blocks` has them.

    Rows are outputs, columns inputs. Each block keeps its first rows; tokens are whole.
    """
    first, *_, last, masks = *params, dict[str, Tensor]()
    for name, value in params.items():
        count = blocks.get(name, 1)
        rows = len(value) if name == last or not count else math.ceil(ratio * len(value) / count)
        columns = value.shape[1] if name == first and count else math.ceil(ratio * value.shape[1])
        mask = torch.zeros_like(value, dtype=torch.bool)
        mask.unflatten(0, (count or 1, -1))[:, :rows, :columns] = True
        masks[name] = mask
    return masks


@dataclass(frozen=True)
class Nested:
    """A client of one of several ratios.

    Attributes:
        ratios: of the clients in turn.
        drawn: whether each step has a ratio drawn from those up to the client's own (FjORD), or always its own.
    """

    ratios: Sequence[float]
    drawn: bool

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise UserError(f"client.ratios = {list(self.ratios)}: must be above 0 and at most 1, and at least one")

    def of(self, client: int) -> float:
        """The largest ratio of a client."""
        return self.ratios[client % len(self.ratios)]

    def loss(self, task: Task, ctx: ClientContext) -> Transform:
        """Weights outside of the sub-model are zero in the forward pass, and have no gradient."""
        largest = self.of(ctx.client)
        allowed = [ratio for ratio in self.ratios if ratio <= largest] if self.drawn else [largest]
        rng, blocks = torch.Generator().manual_seed(derive(ctx.seed, STEPS)), row_blocks(ctx.model)

        def cut(params: Params) -> Params:
            ratio = allowed[int(torch.randint(len(allowed), (), generator=rng))]
            return {n: torch.where(m, params[n], 0.0) for n, m in nested_mask(params, ratio, blocks).items()}

        return cut


@dataclass(frozen=True)
class NestedClient:
    """A client that uploads the sub-model that it has."""

    nested: Nested
    training: Training

    def require(self, model: nn.Module, image: Tensor) -> None:
        """Complain of a model whose weights are not nested by channels. Raises UserError."""
        if others := [name for name in prunable_names(model) if name not in row_blocks(model)]:
            raise UserError(
                "client: nested sub-models need linear, convolution and embedding layers and recurrent ones of one direction; "
                f"{others[0]!r} is of none"
            )

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        """Train and upload the sub-model of this client's ratio."""

        def own(task: Task, params: Params) -> Mask | None:
            return nested_mask(params, self.nested.of(ctx.client), row_blocks(ctx.model))

        return LocalClient(self.training, loss=Through(self.nested.loss), upload=own)(task, ctx)


def heterofl(*, training: Training, ratios: Sequence[float] = (1.0, 0.5, 0.25, 0.125)) -> Client:
    """HeteroFL's client: a sub-model of one ratio.

    Args:
        training: the config's `[training]` table.
        ratios: shares of the channels, of the clients in turn.
    """
    return NestedClient(Nested(tuple(ratios), drawn=False), training)


def fjord(*, training: Training, ratios: Sequence[float] = (1.0, 0.5, 0.25, 0.125)) -> Client:
    """FjORD's client: each step trains a sub-model drawn from those up to the client's own.

    Args:
        training: the config's `[training]` table.
        ratios: shares of the channels, of the clients in turn.
    """
    return NestedClient(Nested(tuple(ratios), drawn=True), training)
