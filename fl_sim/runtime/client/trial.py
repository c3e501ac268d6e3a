"""A client and what it is tried on: calls that differ in one thing each."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fl_sim import models
from fl_sim.codecs import Schema
from fl_sim.communication.extra import ExtraSchemas, declared
from fl_sim.core.process_changes import observed
from fl_sim.core.process_state import seeded
from fl_sim.core.types import Mask, Params, Scalar, Task, Update
from fl_sim.data import Split
from fl_sim.models.parameters import load, snapshot
from fl_sim.runtime.client.leftovers import Shape
from fl_sim.runtime.client.update_validation import as_taken
from fl_sim.sparsity import apply_mask, global_topk_mask, magnitude
from fl_sim.training.client import Client, ClientContext

DENSITY = 0.5
"""Of the mask under which a client is tried."""


@dataclass(frozen=True)
class Attempt:
    """Attempt: one call of the client with its arguments, its result or error, and its seconds."""

    task: Task
    received: Params
    model: nn.Module
    update: Update
    seconds: float
    state: dict[str, Tensor]
    left: str
    """What the call left on the model or in the process, beside its update; empty = nothing."""


@dataclass(frozen=True)
class Examination:
    """A client and what it is tried on.

    Attributes:
        client: the client.
        model: never touched; every attempt gets a copy.
        samples: the client's data.
        config: scalars of `task.config`.
    """

    client: Client
    model: nn.Module
    samples: Split
    config: Mapping[str, Scalar] = field(default_factory=dict)

    def attempt(
        self,
        model: nn.Module,
        *,
        mask: Mask | None = None,
        seed: int = 0,
        start: Params | None = None,
        client: int = 7,
        samples: Split | None = None,
    ) -> Attempt:
        """Call the client; `seed` is of the global generators, which a client must not use.

        `start` are the parameters it gets, by default the model's; `client` seeds its own generator.
        """
        given = snapshot(self.model) if start is None else start
        params = dict(given) if mask is None else apply_mask(given, mask)
        extra = {name: schema.view(torch.zeros(schema.size)) for name, schema in self.extra.down.items()}
        task = Task(1, {name: value.clone() for name, value in params.items()}, mask, self.config, extra=extra)
        generator = torch.Generator().manual_seed(client)
        data = self.samples if samples is None else samples
        context = ClientContext(model=model, data=data, rng=generator, state={}, seed=client)
        before = Shape.of(model)
        with observed() as changed, seeded(seed):
            began = time.perf_counter()
            returned = self.client(task, context)
            seconds = time.perf_counter() - began
        left = before.changes(Shape.of(model)) or (
            f"it changed {changed[0]} for all that runs after it" if changed else ""
        )
        update = cast("Update", as_taken(returned))
        return Attempt(task, params, model, update, seconds, context.state, left)

    @property
    def fresh(self) -> nn.Module:
        """A copy of the model."""
        return copy.deepcopy(self.model)

    @cached_property
    def extra(self) -> ExtraSchemas:
        """The extra tensors that the client declares; those of a task are zero."""
        return declared(self.client).of(Schema.of(snapshot(self.model), models.prunable_names(self.model)))

    @cached_property
    def plain(self) -> Attempt:
        """Call the client without variation."""
        return self.attempt(self.fresh)

    @cached_property
    def again(self) -> Attempt:
        """Call the client on the same task with other global random numbers."""
        return self.attempt(self.fresh, seed=1)

    @cached_property
    def another(self) -> Attempt:
        """Call as another client: half of the samples in another order."""
        return self.attempt(self.fresh, client=8, samples=self.samples.subset(np.arange(len(self.samples) // 2)))

    @cached_property
    def repeated(self) -> Attempt:
        """Call again with nothing varied, after another client."""
        assert self.plain
        assert self.another
        return self.attempt(self.fresh)

    @cached_property
    def after_another(self) -> Attempt:
        """On a model that still holds another client's parameters and statistics."""
        left = self.fresh
        load(left, {name: value + 0.1 for name, value in snapshot(left).items()})
        return self.attempt(left)

    @cached_property
    def mask(self) -> Mask:
        """Half of the prunable weights, by magnitude."""
        params = snapshot(self.model)
        scores = magnitude({name: params[name] for name in models.prunable_names(self.model)})
        return global_topk_mask(scores, DENSITY)

    @cached_property
    def masked(self) -> Attempt:
        """Under a mask."""
        return self.attempt(self.fresh, mask=self.mask)
