"""FedLUAR (Kim, Kang and Lee, 2025, arXiv 2503.11146): layers whose last update the server uses again are not uploaded.

Algorithm 1: the score of layer l is s_l = ||change_l|| / ||weights_l||. Each round `recycled` layers are drawn without
replacement with probabilities in proportion to 1 / s_l; their change of the round before is applied once more, and clients do
not send them (algorithm 2). A layer is a weight matrix here; everything else always travels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from clients.local import LocalClient
from fl_sim.codecs import Schema
from fl_sim.communication.extra import Extra, Fixed
from fl_sim.core.seeding import numpy_generator
from fl_sim.core.types import Mask, Params, Task, UserError
from fl_sim.training.client import Client
from fl_sim.training.loop import Training
from strategies.base import Method
from strategies.server_step import ServerState

DRAW = 42
"""Last element of the key from which layers are drawn."""
SMALLEST = 1e-12
"""Score that a layer without any change counts with."""


def a_number_each(model: Schema) -> Schema:
    """Layout of one number for each weight matrix."""
    return Fixed(dict.fromkeys(model.prunable, (1,)))(model)


RECYCLED = Extra(down={"recycled": a_number_each})
"""1 for a layer that is not to be sent, else 0."""


def upload(task: Task, params: Params) -> Mask | None:
    """Upload mask: whole layers, but those that the server recycles."""
    recycled = task.extra["recycled"]
    return {n: torch.full_like(v, not bool(recycled[n].item()), dtype=torch.bool) for n, v in params.items()}


def client(*, training: Training) -> Client:
    """FedLUAR's client: FedAvg without the layers that the server recycles.

    Args:
        training: the config's `[training]` table.
    """
    return LocalClient(training, upload=upload, extra=RECYCLED)


@dataclass(frozen=True)
class Recycling:
    """The server of FedLUAR; keeps the last change of each layer, and which are recycled next.

    Attributes:
        count: layers that are recycled in a round.
        seed: of the run.
    """

    count: int
    seed: int

    def send(self, state: ServerState) -> Mapping[str, Params]:
        """Which layers are recycled in this round. Raises UserError where no layer would be left."""
        if self.count >= len(state.schema.prunable):
            raise UserError(
                f"strategy.recycled = {self.count}: must be below {len(state.schema.prunable)}, the model's layers"
            )
        zero = torch.zeros(1)
        return {"recycled": {name: state.memory.get(f"next.{name}", zero) for name in state.schema.prunable}}

    def __call__(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        new, memory, scores = dict(aggregated), {}, {}
        for name in state.schema.prunable:
            old, again = state.params[name], state.memory.get(f"next.{name}")
            change = aggregated[name] - old
            if again is not None and bool(again.item()):
                change = state.memory[f"change.{name}"]
                new[name] = old + change
            memory[f"change.{name}"] = change
            scores[name] = max(float(change.norm() / old.norm().clamp(min=SMALLEST)), SMALLEST)
        return new, {
            **memory,
            **{f"next.{n}": torch.tensor([float(n in self.drawn(scores, state.round))]) for n in scores},
        }

    def drawn(self, scores: Mapping[str, float], number: int) -> set[str]:
        """The layers of the next round, without replacement, with probabilities in proportion to 1 / score."""
        names, inverse = list(scores), [1 / score for score in scores.values()]
        rng = numpy_generator(self.seed, number, DRAW)
        chosen = rng.choice(len(names), size=self.count, replace=False, p=[each / sum(inverse) for each in inverse])
        return {names[place] for place in chosen.tolist()}


def server(*, seed: int, recycled: int = 2) -> Method:
    """FedLUAR's server. Goes with `strategies.published.fedluar:client`.

    Args:
        seed: of the run.
        recycled: layers (weight matrices) that are not uploaded in a round, fewer than the model has.
    """
    if recycled < 0:
        raise UserError(f"strategy.recycled = {recycled}: must be at least 0")
    rule = Recycling(recycled, seed)
    return Method(send=rule.send, optimise=rule)
