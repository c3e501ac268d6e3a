"""FetchSGD (Rothchild et al., 2020, arXiv 2007.07682, algorithm 1): clients send a Count Sketch; the server keeps the rest.

The mean of the clients' sketches is the sketch of their mean change, S. With sketches of momentum and error:

    S_u = rho S_u + S,    S_e = S_e + lr S_u,    step = top-k(unsketch(S_e))

and the step's buckets become zero in S_u and S_e (section 5). unsketch takes each weight's median over the rows of its bucket
times its sign. With `wire.broadcast` at the density k the step travels down alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from clients.local import Finish, LocalClient
from clients.sketch_codec import estimated, sketched
from fl_sim.codecs import Schema
from fl_sim.communication.extra import Extra, Fixed
from fl_sim.core.types import Mask, Metrics, Params, Task, UserError
from fl_sim.models import prunable_names
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training
from strategies.base import Method
from strategies.server_step import ServerState

ROWS, SHARE, HASHES, NAME = 5, 0.2, 44, "sketch"
"""Rows of a sketch; its numbers as a share of the weights; seed of the hash functions; name of the tensor that travels."""


@lru_cache(maxsize=4)
def hashes(size: int) -> tuple[Tensor, Tensor]:
    """(bucket, sign) of each of `size` weights in each row, (ROWS, size)."""
    draw, columns = torch.Generator().manual_seed(HASHES), ceil(SHARE * size / ROWS)
    return torch.randint(columns, (ROWS, size), generator=draw), torch.randint(
        2, (ROWS, size), generator=draw
    ) * 2.0 - 1


def sketch(vector: Tensor) -> Tensor:
    """The Count Sketch (ROWS, columns) of a vector."""
    return sketched(vector, zip(*hashes(len(vector)), strict=True), ceil(SHARE * len(vector) / ROWS))


def unsketch(table: Tensor, size: int) -> Tensor:
    """What a sketch says of each of `size` values."""
    return estimated(table, zip(*hashes(size), strict=True))


def layout(model: Schema) -> Schema:
    """Layout of the sketch of a model's weight matrices."""
    return Fixed({NAME: (ROWS, ceil(SHARE * model.prunable_size / ROWS))})(model)


def report(task: Task, ctx: ClientContext) -> Finish:
    """Send the sketch of the change of a round."""
    names = [name for name in task.params if name in prunable_names(ctx.model)]  # in the order of the schema

    def finish(params: Params, metrics: Metrics) -> Mapping[str, Params]:
        change = torch.cat([(params[name].cpu() - task.params[name].cpu()).flatten() for name in names])
        return {NAME: {NAME: sketch(change)}}

    return finish


def no_weight(task: Task, params: Params) -> Mask | None:
    """The empty upload mask."""
    return {name: torch.zeros_like(value, dtype=torch.bool) for name, value in params.items()}


def client(*, training: Training) -> Client:
    """FetchSGD's client: local training, of which a sketch is sent.

    Args:
        training: the config's `[training]` table.
    """
    return LocalClient(training, report=report, upload=no_weight, extra=Extra(up={NAME: layout}))


@dataclass(frozen=True)
class Unsketched:
    """The server's step, see `server`; keeps the sketches of momentum and error."""

    density: float
    lr: float
    momentum: float

    def __post_init__(self) -> None:
        if not (0 < self.density <= 1 and self.lr > 0 and 0 <= self.momentum < 1):
            given = f"density = {self.density}, lr = {self.lr}, momentum = {self.momentum}"
            raise UserError(f"strategy: {given}: must be above 0 and at most 1, above 0, from 0 to below 1")

    def __call__(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        part = state.schema.prunable_part
        if not state.arrived.clients:
            return aggregated, state.memory
        mean = (state.arrived.sums[NAME] / state.arrived.clients).float().view(ROWS, -1)
        momentum = self.momentum * state.memory.get("momentum", torch.zeros_like(mean)) + mean
        error = state.memory.get("error", torch.zeros_like(mean)) + self.lr * momentum
        said = unsketch(error, part.size)
        largest = said.abs().topk(ceil(self.density * part.size)).indices
        sent = sketch(step := torch.zeros(part.size).index_copy_(0, largest, said[largest])) != 0
        kept = {"momentum": momentum.masked_fill(sent, 0), "error": error.masked_fill(sent, 0)}
        return {**aggregated, **part.view(part.flat(state.params) + step)}, kept


def server(*, density: float = 0.02, lr: float = 0.5, momentum: float = 0.9) -> Method:
    """FetchSGD's server. Goes with `strategies.published.fetchsgd:client`.

    Args:
        density: share of the weights that a step changes, above 0 and at most 1.
        lr: server learning rate, above 0.
        momentum: decay of the sketch of momentum, from 0 to below 1.
    """
    return Method(optimise=Unsketched(density, lr, momentum), takes=(NAME,))
