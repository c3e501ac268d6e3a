"""The contract of a client: what it owns, and the function that users write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_sim.core.types import Params, Task, Update
from fl_sim.data.split import Split


def as_they_are(params: Params) -> Params:
    """Parameters as they are: there is no error feedback."""
    return params


@dataclass(slots=True)
class ClientContext:
    """Client context: the model, data and state that a client owns; it never travels.

    `model` is resident in the worker and shared by its clients: load parameters before use. `data` is this client's
    part. `rng` draws the round's random numbers from `seed`, which the run's seed, the round and the partition make;
    a generator of your own starts from `seed` too. `state` is kept between this client's rounds (tensors only).

    `corrected` matters to clients that choose what to send. With `wire.error_feedback` the framework adds what earlier
    uploads left out to the parameters that a client returns, whichever client it is. `corrected(params)` gives prunable
    parameters with that already added, so that a mask made from them can choose what was left out; return the parameters
    as they were trained. Without error feedback they come back as they are.
    """

    model: nn.Module
    data: Split
    num_examples: int
    rng: torch.Generator
    state: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    corrected: Callable[[Params], Params] = as_they_are


Client = Callable[[Task, ClientContext], Update]
