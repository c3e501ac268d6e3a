"""Model-contrastive learning on clients: MOON (Li, He and Song, 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clients.corrections import keep
from clients.distillation import frozen
from clients.local import Finish
from fl_sim.core.types import Metrics, Params, Task, UserError
from fl_sim.data.weights import Batch
from fl_sim.models.layers import head_module
from fl_sim.models.parameters import load
from fl_sim.training.client import ClientContext
from fl_sim.training.losses import Loss, weighs

PREVIOUS = "previous"


def with_representation(model: nn.Module, head: str, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """(what `run` returns, the input of the layer `head` while it ran): the model's representation of its samples."""
    seen: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        return run(), seen[-1]
    finally:
        hook.remove()


@dataclass(frozen=True, eq=False)
class Contrastive:
    """`loss + mu l_con` (equation 4), `l_con = -log(e^(s_g / T) / (e^(s_g / T) + e^(s_p / T)))` (equation 3).

    s_g and s_p are the cosine similarities of the model's representation to those of `received` and `previous`.
    """

    mu: float
    temperature: float
    head: str
    received: nn.Module = field(repr=False)
    previous: nn.Module = field(repr=False)
    loss: Loss

    @property
    def weighs(self) -> bool:
        """Whether the loss that the term is added to uses weights of samples; the term counts each sample alike."""
        return weighs(self.loss)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        value, own = with_representation(model, self.head, lambda: self.loss(model, batch))
        logits = torch.stack([self._similarity(own, other, batch) for other in (self.received, self.previous)], dim=-1)
        first = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return value + self.mu * functional.cross_entropy(logits.flatten(0, -2), first.flatten())

    def _similarity(self, own: Tensor, other: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            _, theirs = with_representation(other, self.head, lambda: other(batch[0]))
        return functional.cosine_similarity(own, theirs, dim=-1) / self.temperature


@dataclass(frozen=True)
class ModelContrast:
    """The client of MOON: learns a representation near the received model's and far from its own previous one.

    The representation is the input of the last linear layer. In a client's first round the two are one model, and the term
    has no gradient.
    """

    mu: float
    temperature: float
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.mu >= 0 or not self.temperature > 0:
            given = f"client.mu = {self.mu}, client.temperature = {self.temperature}"
            raise UserError(f"{given}: must not be negative, and above 0")

    def require(self, model: nn.Module, image: Tensor) -> None:
        """Complain, before anything is trained, of a model without a linear layer. Raises UserError."""
        if head_module(model) is None:
            raise UserError(
                f"clients.presets:moon: {type(model).__name__} has no linear layer, whose input is compared"
            )

    def __call__(self, task: Task, ctx: ClientContext) -> Loss:
        head = head_module(ctx.model)
        assert head is not None, "`require` looked"
        received = frozen(ctx.model)
        own = {name: ctx.state.get(f"{PREVIOUS}.{name}", value) for name, value in task.params.items()}
        return Contrastive(self.mu, self.temperature, head, received, load(frozen(ctx.model), own), ctx.loss)


def remember(task: Task, ctx: ClientContext) -> Finish:
    """Send nothing; keep the trained model for this client's next round."""

    def finish(params: Params, metrics: Metrics) -> Mapping[str, Params]:
        keep(ctx, PREVIOUS, params)
        return {}

    return finish
