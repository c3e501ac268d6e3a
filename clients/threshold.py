"""The `weight` rule of arXiv 2106.06921's second public code: small weights go after each local epoch and may return."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from fl_sim.core.types import Mask, Metrics, Params, Task, UserError
from fl_sim.data import Split
from fl_sim.training.loop import Training
from fl_sim.training.losses import Loss, cross_entropy


@dataclass(frozen=True)
class ThresholdEachEpoch:
    """Training that zeroes convolution weights of at most `threshold` after each epoch, or after all given `steps`.

    No mask is kept: the next epoch may regrow a weight. Momentum and learning-rate schedule start anew in each epoch.
    """

    training: Training
    threshold: float = 1e-3

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise UserError(f"client.threshold = {self.threshold}: must not be negative")

    def fit(
        self,
        model: nn.Module,
        data: Split,
        loss: Loss = cross_entropy,
        *,
        mask: Mask | None = None,
        rng: torch.Generator | None = None,
    ) -> Metrics:
        """See `Training.fit`; the loss is the last epoch's, steps and samples are those of all."""
        filters = _filters(model)
        metrics: Metrics = {}
        for _ in range(1 if self.training.steps else self.training.epochs):
            last = replace(self.training, epochs=1).fit(model, data, loss, mask=mask, rng=rng)
            metrics = last | {name: metrics.get(name, 0) + last[name] for name in ("steps", "examples")}
            with torch.no_grad():
                for weight in filters:
                    weight.masked_fill_(weight.abs() <= self.threshold, 0.0)
        return metrics

    def require(self, model: nn.Module, image: torch.Tensor) -> None:
        """Complain of a model that has nothing to zero, before anything is trained. Raises UserError."""
        if not _filters(model):
            raise UserError(
                "client = 'clients.presets:weight_threshold': no convolution weight is trained (model.name, model.trainable, "
                "model.adapter), and only those are set to zero"
            )

    def at(self, number: int) -> ThresholdEachEpoch:
        """See `Training.at`."""
        return replace(self, training=self.training.at(number))


def _filters(model: nn.Module) -> list[nn.Parameter]:
    """The convolution weights that are trained; one that is computed from others, as by an adapter, is none."""
    held = [m._parameters.get("weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [weight for weight in held if weight is not None and weight.requires_grad]


def not_zero(task: Task, params: Params) -> Mask:
    """Send what is not zero."""
    return {name: value != 0 for name, value in params.items()}
