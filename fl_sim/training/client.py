"""The contract of a client: what it owns, and the function that users write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_sim.core.types import Params, Task, Update
from fl_sim.data.split import Split
from fl_sim.training.tasks import CLASSIFICATION, LearningTask


def as_they_are(params: Params) -> Params:
    """Parameters as they are: there is no error feedback."""
    return params


@dataclass(slots=True)
class ClientContext:
    """Client context: the model, data and state that a client owns; it never travels.

    Attributes:
        model: resident in the worker and shared by its clients: load parameters before use.
        data: this client's training samples.
        rng: draws the round's random numbers; starts from `seed`.
        state: tensors that are kept between this client's rounds.
        seed: made of the run's seed, the round and the partition, for a generator of your own.
        corrected: adds the residual of error feedback to prunable parameters, for clients that choose what to send. The
            framework adds it to the parameters that any client returns (`wire.error_feedback`), so return them as they
            were trained, and make the upload mask from `corrected(params)`. Without error feedback it changes nothing.
        loss: the loss of the config's `task`, for the training loop; `evaluate(model, data, ctx.loss)` measures the task.
    """

    model: nn.Module
    data: Split
    rng: torch.Generator
    state: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    corrected: Callable[[Params], Params] = as_they_are
    loss: LearningTask = CLASSIFICATION

    @property
    def num_examples(self) -> int:
        """Number of this client's training samples, its weight in the mean."""
        return len(self.data)


Client = Callable[[Task, ClientContext], Update]
