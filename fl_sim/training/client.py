"""The contract of a client: what it owns, and the function that users write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_sim.core.types import Task, Update
from fl_sim.data.split import Split


@dataclass(slots=True)
class ClientContext:
    """What a client owns; it never travels.

    `model` is resident in the worker and shared by its clients: load parameters before use. `data` is this client's
    part. `rng` draws the round's random numbers from `seed`, which the run's seed, the round and the partition make;
    a generator of your own starts from `seed` too. `state` is kept between this client's rounds (tensors only).
    """

    model: nn.Module
    data: Split
    num_examples: int
    rng: torch.Generator
    state: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0


Client = Callable[[Task, ClientContext], Update]
