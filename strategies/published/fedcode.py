"""FedCode (Khalilian et al., 2023, arXiv 2311.09270): clients send the cluster centres of their weights, and the weights seldom.

All weight matrices share one codebook of K centres. A client trains, clusters its weights from the received centres on (k-means)
and sends its centres; the server moves its weights from their centres to the clients' mean centres. In every `request`-th round,
and in the first `start` rounds, clients send weights too, as centres after the start; the server averages them and makes the
codebook anew. Weights of K values are small where they travel as `float32-zstd`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clients.local import LocalClient
from fl_sim.communication.extra import Extra, Fixed
from fl_sim.core.types import Mask, Params, Task, Update, UserError
from fl_sim.models import prunable_names
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training
from strategies.base import Method
from strategies.server_step import ServerState

CENTRES, STEPS, BOOK, ASKED = 64, 5, "codebook", "asked"
"""K of the paper's experiments; steps of k-means; names of what travels."""
LAYOUT = Fixed({BOOK: (CENTRES,)})


def nearest(values: Tensor, centres: Tensor) -> Tensor:
    """Number of the nearest of sorted centres, for each value."""
    return torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)


def clustered(values: Tensor, centres: Tensor) -> Tensor:
    """Sorted centres after k-means in one dimension; from evenly many values between each two where `centres` are zeros."""
    if not centres.any():
        centres = values.sort().values[torch.linspace(0, len(values) - 1, CENTRES).long()]
    for _ in range(STEPS):
        own = nearest(values, centres)
        count = torch.bincount(own, minlength=CENTRES)
        total = torch.bincount(own, weights=values.double(), minlength=CENTRES)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres.double()).float().sort().values
    return centres


def upload(task: Task, params: Params) -> Mask | None:
    """All weights in a round that asks for them, else none."""
    asked = bool(task.extra[ASKED][ASKED].item())
    return {name: torch.full_like(value, asked, dtype=torch.bool) for name, value in params.items()}


@dataclass(frozen=True)
class BookClient:
    """A client that sends its centres."""

    training: Training
    extra = Extra({BOOK: LAYOUT, ASKED: Fixed({ASKED: (1,)})}, {BOOK: LAYOUT})

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        """Train, cluster, and replace weights by their centres."""
        update = LocalClient(self.training, upload=upload)(task, ctx)
        weights = {name: update.params[name].cpu() for name in prunable_names(ctx.model) if name in task.params}
        received = task.extra[BOOK][BOOK]
        book = clustered(torch.cat([value.flatten() for value in weights.values()]), received)
        if received.any():
            weights = {name: book[nearest(value, book)] for name, value in weights.items()}
        return replace(update, params={**update.params, **weights}, extra={BOOK: {BOOK: book}})


def client(*, training: Training) -> Client:
    """FedCode's client.

    Args:
        training: the config's `[training]` table.
    """
    return BookClient(training)


@dataclass(frozen=True)
class Codebook:
    """The server, see `server`: keeps the centres that its weights have."""

    start: int
    request: int

    def __post_init__(self) -> None:
        if self.start < 1 or self.request < 1:
            raise UserError(f"strategy: start = {self.start}, request = {self.request}: must be at least 1")

    def asks(self, number: int) -> bool:
        """Whether a round, the first is 1, asks for weights."""
        return number <= self.start or number % self.request == 0

    def send(self, state: ServerState) -> Mapping[str, Params]:
        """The centres, zeros while there are none, and whether weights are asked for."""
        book, asked = state.memory.get(BOOK, torch.zeros(CENTRES)), float(self.asks(state.round + 1))
        return {BOOK: {BOOK: book}, ASKED: {ASKED: torch.tensor([asked])}}

    def __call__(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        part, number = state.schema.prunable_part, state.round + 1
        if number < self.start or not state.arrived.clients:
            return aggregated, state.memory
        values = part.flat(aggregated)  # as they were where no weight was sent
        if self.asks(number):
            own = book = clustered(values, torch.zeros(CENTRES))
        else:
            own, book = state.memory[BOOK], (state.arrived.sums[BOOK] / state.arrived.clients).float()
        return {**aggregated, **part.view(book[nearest(values, own)])}, {BOOK: book}


def server(*, start: int = 2, request: int = 2) -> Method:
    """FedCode's server. Goes with `strategies.published.fedcode:client`.

    Args:
        start: rounds at the start in which weights travel as they are, at least 1.
        request: rounds from one upload of weights to the next, at least 1.
    """
    return Method(send=(rule := Codebook(start, request)).send, optimise=rule, takes=(BOOK,))
