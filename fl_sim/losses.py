"""Losses that fill the one slot of the training loop: `(model, batch) -> scalar`; a batch unpacks to images, labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from fl_sim.types import Params

Batch = tuple[Tensor, Tensor]
"""images (B, C, H, W) float32 normalised, labels (B,) int64."""
Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the model's logits."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy with label smoothing (Szegedy et al., 2016)."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Proximal:
    """`loss + mu/2 ||w - anchor||^2` over the named parameters (FedProx; Li et al., 2020, equation 2)."""

    mu: float
    anchor: Params
    loss: Loss = cross_entropy

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        value = self.loss(model, batch)
        for name, parameter in model.named_parameters():
            value = value + 0.5 * self.mu * (parameter - self.anchor[name]).square().sum()
        return value


@dataclass(frozen=True)
class Distillation:
    """`alpha T^2 KL(softmax(z_t/T) || softmax(z_s/T)) + (1 - alpha) CE` (Hinton et al., 2015), KL as a batch mean.

    Attributes:
        temperature: T > 0.
        alpha: weight of the teacher, 0..1; many codes give it to the labels instead.
    """

    temperature: float = 4.0
    alpha: float = 0.5

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        hard = functional.cross_entropy(student_logits, labels)
        if self.alpha == 0.0:
            return hard
        student = functional.log_softmax(student_logits / self.temperature, dim=1)
        teacher = functional.log_softmax(teacher_logits.detach() / self.temperature, dim=1)
        soft = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return self.alpha * self.temperature**2 * soft + (1 - self.alpha) * hard
