"""Losses that fill the one slot of the training loop: `(model, batch) -> scalar`; a batch unpacks to inputs, targets.

Objectives (`Distillation`, `FeatureDistillation`) are formulas over tensors; `FromTeacher` and `FeaturesFromTeacher`
turn them into losses by asking a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from fl_sim.core.types import Params, UserError
from fl_sim.data.weights import Batch, weights_of

Loss = Callable[[nn.Module, Batch], Tensor]


def weighs(loss: object) -> bool:
    """Whether a loss uses the weights of a batch's samples: it says so by an attribute `weighs`."""
    return bool(getattr(loss, "weighs", False))


def mean_loss(criterion: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, batch: Batch) -> Tensor:
    """The criterion of outputs beside targets; where samples have weights w, sum(w loss) / sum(w), as `nn.CrossEntropyLoss` does
    with weights of classes.

    Args:
        criterion: (outputs (B, ...), targets (B, ...)) -> mean loss.
        outputs: of the batch's inputs.
        batch: whose targets and weights.
    """
    targets, weights = batch[1], weights_of(batch)
    if weights is None:
        return criterion(outputs, targets)
    each = vmap(lambda out, target: criterion(out[None], target[None]))(outputs, targets)
    return (each * weights).sum() / weights.sum()


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} = {value}: must be between 0 and 1")


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the model's logits: of a class each (B,), or of a token at every position (B, T).

    Raises:
        UserError: targets that are no classes; `ctx.loss` is the loss of every task.
    """
    return mean_loss(cross_entropy_of, model(batch[0]), batch)


cross_entropy.weighs = True  # type: ignore[attr-defined]


def cross_entropy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, classes) and classes (B,), or of logits (B, T, tokens) and tokens (B, T).

    Raises:
        UserError: targets that are no classes.
    """
    if labels.dtype != torch.int64:  # PyTorch would take numbers for probabilities of classes
        raise UserError(f"cross-entropy: targets are {labels.dtype}; needed: classes, int64; ctx.loss fits every task")
    if labels.dim() == 2:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return functional.cross_entropy(logits, labels)


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy with label smoothing (Szegedy et al., 2016)."""

    label_smoothing: float = 0.0
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share("label_smoothing", self.label_smoothing)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        criterion = partial(functional.cross_entropy, label_smoothing=self.label_smoothing)
        return mean_loss(criterion, model(batch[0]), batch)


@dataclass(frozen=True, eq=False)
class Proximal:
    """`loss + mu/2 ||w - anchor||^2` over the trainable parameters (FedProx; Li et al., 2020, equation 2).

    Attributes:
        mu: strength, not negative.
        anchor: what the parameters are pulled to, by name; names that are not trainable parameters are ignored.
        loss: the loss that the term is added to.
    """

    mu: float
    anchor: Params = field(repr=False)
    loss: Loss = cross_entropy

    @property
    def weighs(self) -> bool:
        """Whether the loss that the term is added to uses weights of samples."""
        return weighs(self.loss)

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise UserError(f"mu = {self.mu}: must not be negative")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        value = self.loss(model, batch)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if name not in self.anchor:
                    raise UserError(f"anchor: no entry for the trainable parameter {name!r}")
                drift = parameter - self.anchor[name].to(parameter.device)
                value = value + 0.5 * self.mu * drift.square().sum()
        return value


HOTTEST = 1e6
"""A temperature that makes all logits of float32 equal; its square multiplies the loss."""


@dataclass(frozen=True)
class Distillation:
    """`alpha T^2 KL(softmax(z_t/T) || softmax(z_s/T)) + (1 - alpha) CE` (Hinton et al., 2015), KL as a batch mean.

    No gradient reaches the teacher's logits.

    Attributes:
        temperature: T, above 0 and at most `HOTTEST`.
        alpha: weight of the teacher, 0..1; many codes give it to the labels instead.
    """

    temperature: float = 4.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_share("alpha", self.alpha)
        if not 0 < self.temperature <= HOTTEST:
            raise UserError(f"temperature = {self.temperature}: must be above 0 and at most {HOTTEST:g}")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, K) and labels (B,), or (B, T, K) and (B, T) with a mean over positions too -> scalar."""
        if labels.dim() == 2:  # tokens
            student_logits, teacher_logits = student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)
            labels = labels.flatten()
        hard = functional.cross_entropy(student_logits, labels)
        if self.alpha == 0.0:
            return hard
        student = functional.log_softmax(student_logits / self.temperature, dim=1)
        teacher = functional.log_softmax(teacher_logits.detach() / self.temperature, dim=1)
        soft = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return self.alpha * self.temperature**2 * soft + (1 - self.alpha) * hard


def unscaled(teacher: Tensor) -> Tensor:
    """1: features are compared as they are."""
    return torch.ones((), device=teacher.device)


def teacher_std(teacher: Tensor) -> Tensor:
    """Standard deviation of the teacher's features: makes errors of different teachers comparable."""
    return teacher.std().clamp_min(torch.finfo(teacher.dtype).tiny)


@dataclass(frozen=True)
class FeatureDistillation:
    """`alpha (mean_l MSE_l + beta mean_l (1 - cos_l)) + (1 - alpha) CE` over stages l (arXiv 2605.31191).

    MSE over all elements of a stage's maps, the student's average-pooled to the teacher's height and width; the cosine
    between the maps' means over positions, averaged over the batch. No gradient reaches the teacher's features.

    Attributes:
        alpha: weight of the teacher, 0..1.
        beta: weight of the cosine term beside the squared error, not negative.
        scale: teacher's stage -> what both sides are divided by.
    """

    alpha: float = 0.5
    beta: float = 0.5
    scale: Callable[[Tensor], Tensor] = unscaled

    def __post_init__(self) -> None:
        _check_share("alpha", self.alpha)
        if not self.beta >= 0:
            raise UserError(f"beta = {self.beta}: must not be negative")

    def __call__(
        self, student_logits: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Logits (B, K), projected student stages and teacher stages (B, C_l, H_l, W_l), labels (B,) -> scalar."""
        hard = functional.cross_entropy(student_logits, labels)
        if self.alpha == 0.0:
            return hard
        if len(student) != len(teacher) or not teacher:
            raise UserError(
                f"{len(student)} student stages, {len(teacher)} of the teacher; must agree, and be at least 1"
            )
        soft = torch.stack([self._stage(s, t.detach()) for s, t in zip(student, teacher, strict=True)]).mean()
        return self.alpha * soft + (1 - self.alpha) * hard

    def _stage(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape[1] != teacher.shape[1]:
            raise UserError(
                f"student stage of {student.shape[1]} channels, teacher's has {teacher.shape[1]}; project it"
            )
        scale = self.scale(teacher)
        student, teacher = student / scale, teacher / scale
        if student.shape[2:] != teacher.shape[2:]:
            student = functional.adaptive_avg_pool2d(student, (teacher.shape[2], teacher.shape[3]))
        cosine = functional.cosine_similarity(student.mean((2, 3)), teacher.mean((2, 3)), dim=1)
        return functional.mse_loss(student, teacher) + self.beta * (1 - cosine).mean()


class Projections(nn.Module):
    """Projections: a bias-free 1x1 convolution for each stage, from the student's channels to the teacher's.

    They train with the student (same optimiser, same gradient clipping), also where widths agree, and are thrown away
    afterwards. Xavier-uniform, drawn from `rng`.
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, rng: torch.Generator
    ) -> None:
        super().__init__()
        if len(student_channels) != len(teacher_channels):
            raise UserError(
                f"{len(student_channels)} student stages, {len(teacher_channels)} of the teacher; must agree"
            )
        self.stages = nn.ModuleList()
        for wide, wanted in zip(student_channels, teacher_channels, strict=True):
            convolution = nn.utils.skip_init(nn.Conv2d, wide, wanted, 1, bias=False)
            nn.init.xavier_uniform_(convolution.weight, generator=rng)
            self.stages.append(convolution)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project the student's stages (B, C_s, H, W) to the teacher's channels (B, C_t, H, W)."""
        return [project(feature) for project, feature in zip(self.stages, features, strict=True)]


def with_features(model: nn.Module, images: Tensor, stages: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """(logits, outputs of the named submodules) of one forward pass; the model is as before afterwards.

    Raises:
        UserError: a name that is no submodule, or one that the pass does not reach.
    """
    modules, caught = dict(model.named_modules()), dict[str, Tensor]()

    def catch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: caught.update({name: output})

    if unknown := [name for name in stages if name not in modules]:
        raise UserError(f"stages: no submodule {unknown[0]!r}; allowed: {', '.join(filter(None, modules))}")
    hooks = [modules[name].register_forward_hook(catch(name)) for name in stages]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if unreached := [name for name in stages if name not in caught]:
        raise UserError(f"stages: the forward pass does not reach {unreached[0]!r}")
    return logits, [caught[name] for name in stages]


@dataclass(frozen=True, eq=False)
class FromTeacher:
    """Distillation from the logits of a frozen teacher, which is always asked in evaluation mode, without gradients."""

    teacher: nn.Module = field(repr=False)
    objective: Distillation = Distillation()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            teacher_logits = self.teacher.eval()(images)
        return self.objective(model(images), teacher_logits, labels)


@dataclass(frozen=True, eq=False)
class FromLogits:
    """Distillation from logits computed beforehand: a batch's labels are the samples' positions in both tensors.

    Attributes:
        teacher: logits (N, K).
        labels: the samples' classes (N,), int64.
        objective: the formula.
    """

    teacher: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    objective: Distillation = Distillation()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        images, positions = batch
        return self.objective(model(images), self.teacher[positions], self.labels[positions])


class FeaturesFromTeacher(nn.Module):
    """Distillation from the stages of a frozen teacher; a module, because its projections are trained.

    Args:
        teacher: asked in evaluation mode, without gradients; not a submodule, so nothing trains or saves it.
        projections: from the student's stages to the teacher's.
        stages: names of the submodules whose outputs are compared, (student's, teacher's) a stage.
        objective: the formula.
    """

    def __init__(
        self,
        teacher: nn.Module,
        projections: Projections,
        *,
        stages: Sequence[tuple[str, str]],
        objective: FeatureDistillation | None = None,
    ) -> None:
        super().__init__()
        self._teacher = (teacher,)  # In a tuple, where nn.Module does not register it.
        self.projections = projections
        self.stages = tuple(stages)
        self.objective = objective or FeatureDistillation()

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        with torch.no_grad():
            _, wanted = with_features(self._teacher[0].eval(), images, [name for _, name in self.stages])
        logits, own = with_features(model, images, [name for name, _ in self.stages])
        return self.objective(logits, self.projections(own), wanted, labels)
