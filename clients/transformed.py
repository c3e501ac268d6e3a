"""Training through a function of the weights: the loss sees other weights than those that are trained.

LocalClient(training, loss=Through(lambda task, ctx: largest))     # the forward pass has the largest weights alone
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from fl_sim.core.types import Params, Task
from fl_sim.data.weights import Batch
from fl_sim.models import prunable_names
from fl_sim.training.client import ClientContext
from fl_sim.training.losses import Loss

Transform = Callable[[Params], Params]
"""Prunable parameters that are trained -> those of the forward pass; differentiable. Called once a step."""


class Seen(nn.Module):
    """A model whose forward pass has transformed weights; buffers such as BatchNorm statistics are the model's own."""

    def __init__(self, model: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.inside, self._transform, self._names = model, transform, prunable_names(model)
        self.training = model.training

    def forward(self, inputs: Tensor) -> object:
        """What the model answers with transformed weights."""
        named = dict(self.inside.named_parameters())
        return functional_call(self.inside, self._transform({name: named[name] for name in self._names}), (inputs,))


class At(nn.Module):
    """A model at other weights than its own, all of them in one flat tensor; buffers are the model's own."""

    def __init__(self, inner: nn.Module, flat: Tensor) -> None:
        super().__init__()
        self.inner, self.flat = inner, flat
        self.training = inner.training

    def forward(self, inputs: Tensor) -> object:
        """What the model answers there."""
        named = dict(self.inner.named_parameters())
        parts = self.flat.split([value.numel() for value in named.values()])
        moved = {name: part.view_as(value) for (name, value), part in zip(named.items(), parts, strict=True)}
        return functional_call(self.inner, moved, (inputs,))


@dataclass(frozen=True)
class Through:
    """The task's loss of transformed weights; a slot of `LocalClient`.

    Attributes:
        transform: (task, context) -> the function of this client's round.
    """

    transform: Callable[[Task, ClientContext], Transform]
    weighs: ClassVar[bool] = True

    def __call__(self, task: Task, ctx: ClientContext) -> Loss:
        transform, inner = self.transform(task, ctx), ctx.loss

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return inner(Seen(model, transform), batch)

        loss.weighs = True  # type: ignore[attr-defined]
        return loss
