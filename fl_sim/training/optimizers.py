"""Optimizers: SGD and AdamW.

SGD is our own: building an optimiser of PyTorch imports its compiler, a second of every process's start, and each of its steps
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


class AdamW:
    """PyTorch's own (Loshchilov and Hutter, 2019)."""

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float) -> None:
        self._inner = torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=True)

    def step(self, lr: float) -> None:
        """See `Optimizer.step`."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        self._inner.step()
