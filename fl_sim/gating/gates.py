"""The gate of one convolution: scores each channel for each sample, keeps the highest, and remembers what it kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fl_sim.core.types import UserError
from fl_sim.gating.graph import kept_channels, top_channels
from fl_sim.gating.salience import Activation, FilterWeight, LearnedGate, PublishedGate


def _spread(factor: Tensor, z: Tensor) -> Tensor:
    """(B, C) beside (B, C, H, W), in its dtype."""
    return factor.to(z.dtype).view(*factor.shape, *(1,) * (z.dim() - 2))


class _GradientMask(torch.autograd.Function):
    """The identity, whose gradient passes the masked channels alone."""

    @staticmethod
    def forward(ctx, z: Tensor, mask: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(mask)
        return z.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (mask,) = ctx.saved_tensors
        return grads[0] * _spread(mask, grads[0]), None


class _SalientGradient(torch.autograd.Function):
    """The identity; channels are scored by |mean(z dL/dz)| when the gradient arrives, and only the highest pass."""

    @staticmethod
    def forward(ctx, z: Tensor, gate: Gate) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z)
        ctx.gate = gate
        return z.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (z,) = ctx.saved_tensors
        scores = (z * grads[0]).flatten(2).mean(dim=2).abs()
        mask = ctx.gate.select(scores)
        return grads[0] * _spread(mask, grads[0]), None


@dataclass(frozen=True)
class Masking:
    """Masking: (normalised output, scores to multiply by or None, mask) -> output.

    Attributes:
        apply: the function.
        silences: off channels are zero in the forward pass, so that later convolutions can skip them.
    """

    apply: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    silences: bool


def _both(z: Tensor, scores: Tensor | None, mask: Tensor) -> Tensor:
    return z * _spread(mask if scores is None else scores * mask, z)


def _backward(z: Tensor, scores: Tensor | None, mask: Tensor) -> Tensor:
    dense = z if scores is None else z * _spread(scores, z)
    return cast(Tensor, _GradientMask.apply(dense, mask))


both_ways = Masking(_both, silences=True)
"""Off channels are zero forward, and therefore backward: the method."""
backward_only = Masking(_backward, silences=False)
"""Dense forward; an off channel only loses its gradient (the ablation; compare meProp, Sun et al., 2017)."""


class Gate(nn.Module):
    """Per-sample channel selection behind one convolution's BatchNorm.

    Attributes:
        channels: of the convolution's output.
        kept: of them for each sample; the rest is off.
        mask: (B, C) bool, what the last pass kept; None before the first.
    """

    beside_the_path = True
    """Its linear layer is never a model's head, see `fl_sim.models.head_names`."""
    active: Tensor
    salience_sum: Tensor
    seen: Tensor

    def __init__(self, conv: nn.Conv2d, salience: nn.Module, masking: Masking) -> None:
        super().__init__()
        self.channels = self.kept = conv.out_channels
        self.salience, self.masking = salience, masking
        self.mask: Tensor | None = None
        # Not persistent: what one client saw is no parameter of the federation.
        self.register_buffer("active", torch.zeros(self.channels), persistent=False)
        self.register_buffer("salience_sum", torch.zeros(self.channels), persistent=False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    @property
    def silences(self) -> bool:
        """Whether off channels are zero in the forward pass."""
        return self.masking.silences

    @property
    def skips(self) -> bool:
        """Whether the guarded convolution itself need not compute off channels."""
        return self.masking.silences and bool(self.salience.predictive)

    def set_keep(self, ratio: float) -> None:
        """Keep round(ratio * channels) from now on, at least one."""
        self.kept = kept_channels(ratio, self.channels)

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        """x: the convolution's input; z: its normalised output (B, C, H, W); filters: its weight. Like z."""
        scores = self.salience(x, z, filters)
        return self.masking.apply(z, scores if self.salience.scales else None, self.select(scores))

    def select(self, scores: Tensor) -> Tensor:
        """The mask of these scores (B, C), remembered, and in training mode counted."""
        scores = scores.detach()
        self.mask = top_channels(scores, self.kept)
        if self.training:
            with torch.no_grad():
                self.active += self.mask.sum(dim=0)
                self.salience_sum += (scores * self.mask).sum(dim=0)
                self.seen += len(scores)
        return self.mask

    def reset(self) -> None:
        """Forget what was counted."""
        for counter in (self.active, self.salience_sum, self.seen):
            counter.zero_()


class TaylorGate(Gate):
    """Dense forward; in training only the gradients of the channels with the highest |mean(z dL/dz)| pass (`taylor`).

    First-order Taylor importance (Molchanov et al., 2017, equation 8, per sample). It needs the gradient, so it decides
    nothing in the forward pass and saves no MACs at inference; the salience it accumulates chooses what is uploaded.
    """

    skips = silences = False

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        """See `Gate.forward`."""
        return cast(Tensor, _SalientGradient.apply(z, self)) if self.training else z


LEAST_TEMPERATURE = 1e-3
"""Below, sigmoids are 0 or 1 and nothing is learned; above its inverse, all are the unit gate."""
MakeGate = Callable[[nn.Conv2d, torch.Generator, Masking], Gate]
"""(convolution, generator of initial parameters, masking) -> its gate."""


def scored_by(salience: Callable[[nn.Conv2d, torch.Generator], nn.Module]) -> MakeGate:
    """Gates with this salience, described as it is."""

    def make(conv: nn.Conv2d, rng: torch.Generator, masking: Masking) -> Gate:
        return Gate(conv, salience(conv, rng), masking)

    make.__doc__ = salience.__doc__
    return make


def _taylor(conv: nn.Conv2d, rng: torch.Generator, masking: Masking) -> Gate:
    """First-order Taylor importance |mean(z dL/dz)| of the output channel; masks gradients only (`taylor`)."""
    return TaylorGate(conv, nn.Identity(), masking)


def at_temperature(make: MakeGate, temperature: float) -> MakeGate:
    """Gates whose learned logits are divided by this.

    Raises:
        UserError: it is no temperature, or the gates have no logits.
    """
    if not LEAST_TEMPERATURE <= temperature <= 1 / LEAST_TEMPERATURE:
        raise UserError(
            f"gating.temperature = {temperature}: must be at least {LEAST_TEMPERATURE:g} and at most {1 / LEAST_TEMPERATURE:g}"
        )
    if temperature == 1:
        return make
    if make is not SALIENCES["gate"]:
        raise UserError(f'gating.temperature = {temperature}: only gating.salience = "gate" has one')

    def tempered(conv: nn.Conv2d, rng: torch.Generator, masking: Masking) -> Gate:
        gate = make(conv, rng, masking)
        if isinstance(gate.salience, LearnedGate):
            gate.salience.temperature = temperature
        return gate

    return tempered


SALIENCES: dict[str, MakeGate] = {
    "gate": scored_by(LearnedGate),
    "gate_relu": scored_by(PublishedGate),
    "activation": scored_by(Activation),
    "taylor": _taylor,
    "weight": scored_by(FilterWeight),
}
