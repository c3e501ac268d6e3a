"""Optimizers: SGD and AdamW.

They are our own: building an optimiser of PyTorch imports its compiler, a second of every process's start, and each of its steps
passes through hooks that cost as much as a small model's update. The results are equal bit for bit (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


class Optimizer(Protocol):
    """Moves its parameters; those without a gradient stay."""

    def step(self, lr: float) -> None:
        """Take one step along the gradients, at this learning rate."""


@dataclass
class SGD:
    """Stochastic gradient descent as `torch.optim.SGD` does it: heavy-ball or Nesterov momentum, L2 penalty."""

    parameters: Sequence[nn.Parameter]
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    _values: list[Tensor] = field(init=False, repr=False)
    _velocity: dict[Tensor, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._values = [p.detach() for p in self.parameters]  # the same memory; no graph to keep them out of

    def step(self, lr: float) -> None:
        """See `Optimizer.step`."""
        found = [(value, p.grad) for value, p in zip(self._values, self.parameters, strict=True) if p.grad is not None]
        if not found:
            return
        moved = [value for value, _ in found]
        grads = [gradient for _, gradient in found]
        if self.weight_decay:
            grads = list(torch._foreach_add(grads, moved, alpha=self.weight_decay))
        if self.momentum:
            grads = self._accelerated(moved, grads)
        torch._foreach_add_(moved, grads, alpha=-lr)

    def _accelerated(self, moved: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        old = [(p, g) for p, g in zip(moved, grads, strict=True) if p in self._velocity]
        if old:
            velocities = [self._velocity[p] for p, _ in old]
            torch._foreach_mul_(velocities, self.momentum)
            torch._foreach_add_(velocities, [g for _, g in old])
        for parameter, gradient in zip(moved, grads, strict=True):
            self._velocity.setdefault(parameter, gradient.detach().clone())
        velocities = [self._velocity[p] for p in moved]
        return list(torch._foreach_add(grads, velocities, alpha=self.momentum)) if self.nesterov else velocities


BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as PyTorch has them by default."""
Moments = tuple[Tensor, Tensor, Tensor]
"""Mean of the gradients, mean of their squares, number of steps."""


@dataclass
class AdamW:
    """AdamW (Loshchilov and Hutter, 2019) as `torch.optim.AdamW(fused=True)` does it: the same call, without what surrounds it."""

    parameters: Sequence[nn.Parameter]
    weight_decay: float
    _moments: dict[nn.Parameter, Moments] = field(default_factory=dict, repr=False)

    def step(self, lr: float) -> None:
        """See `Optimizer.step`."""
        alike: dict[tuple[torch.device, torch.dtype], dict[nn.Parameter, Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is not None:
                alike.setdefault((parameter.device, parameter.dtype), {})[parameter] = parameter.grad
        for gradients in alike.values():
            self._step(gradients, lr)

    def _step(self, gradients: dict[nn.Parameter, Tensor], lr: float) -> None:
        means, squares, steps = map(list, zip(*map(self._moments_of, gradients), strict=True))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [parameter.detach() for parameter in gradients],
            list(gradients.values()),
            means,
            squares,
            [],
            steps,
            lr=lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )

    def _moments_of(self, parameter: nn.Parameter) -> Moments:
        if parameter not in self._moments:
            value = parameter.detach()
            count = torch.zeros((), dtype=torch.float32, device=value.device)
            self._moments[parameter] = torch.zeros_like(value), torch.zeros_like(value), count
        return self._moments[parameter]
