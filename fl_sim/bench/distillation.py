"""Which student profits from which teacher: the capacity study of arXiv 2605.31191, for any pair of models.

For every pair a teacher and a student alone are trained, then the student once for each setting of each method with the
first seed; the validation set chooses the setting; the chosen one and the baseline are trained with all seeds and measured
on the test set, once. Every training leaves a model file that is read instead when the study is run again.

Deviations: the learning rate falls along a cosine to 0 by step (the paper: to 1e-4 by epoch); the last model counts, not
the best on validation.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fl_sim import models
from fl_sim.config import Experiment
from fl_sim.data import Split
from fl_sim.features import feature_loss
from fl_sim.federation import AUGMENT, Federation, resolved
from fl_sim.fidelity import agreement, divergence, mean_std, welch
from fl_sim.losses import Distillation, FeatureDistillation, FromTeacher, Loss, cross_entropy
from fl_sim.model_file import read_model, write_model
from fl_sim.seeding import Purpose, generator
from fl_sim.training import Training, evaluate, logits, snapshot
from fl_sim.types import UserError

Objective = Distillation | FeatureDistillation
NOISE = 0.05
"""Level of Welch's test below which a difference is called one."""


@dataclass(frozen=True)
class Trial:
    """One training: a model alone, or under a teacher with an objective."""

    model: str
    seed: int
    training: Training
    teacher: Trial | None = None
    objective: Objective | None = None


def unseen(trial: Trial) -> None:
    """A display that shows nothing."""


@dataclass(frozen=True)
class Row:
    """One method of one pair; accuracies in percent on the test set, over the seeds.

    Attributes:
        pair: teacher-student.
        method: "teacher", "baseline", "logit" or "feature".
        setting: what validation chose.
        seeds: trainings.
        params: of the model alone; projections are not part of it.
        validation: accuracy of the first seed's training on the validation set.
        test, std: mean and sample standard deviation.
        gain: mean test accuracy above the baseline's, percentage points.
        p: Welch's test against the baseline.
        effect: "+" or "-" where p < 0.05 (not corrected for the number of rows), "none shown" otherwise.
        agreement: with the teacher, percent; kl_1, kl_4: divergence from the teacher at temperatures 1 and 4; means.
    """

    pair: str
    method: str
    setting: str
    seeds: int
    params: int
    validation: float
    test: float
    std: float
    gain: float
    p: float
    effect: str
    agreement: float
    kl_1: float
    kl_4: float


@dataclass(frozen=True)
class Grid:
    """The settings among which validation chooses; the paper's are alpha 0.3, 0.5, 0.7, T 2, 3, 4, beta 0.5."""

    alphas: Sequence[float] = (0.3, 0.5, 0.7)
    temperatures: Sequence[float] = (2.0, 3.0, 4.0)
    beta: float = 0.5

    def methods(self) -> Mapping[str, list[Objective]]:
        """Method -> its settings."""
        logit: list[Objective] = [Distillation(t, a) for a in self.alphas for t in self.temperatures]
        return {"logit": logit, "feature": [FeatureDistillation(a, self.beta) for a in self.alphas]}


@dataclass(frozen=True)
class Study:
    """Centralised trainings of an experiment: its data, `[training]`, `[model]` width and device.

    Attributes:
        federation: the experiment's; partitions and clients play no part.
        folder: receives the model files.
        on_trial: told of each training before it starts.
    """

    federation: Federation
    folder: Path
    on_trial: Callable[[Trial], None] = unseen

    @cached_property
    def train(self) -> Split:
        """Training images, augmented as the experiment says."""
        experiment = self.federation.experiment
        return self.federation.data.train.augmented(AUGMENT[experiment.data.augment]).to(self.federation.device)

    def file(self, trial: Trial) -> Path:
        """Where a trial's model is kept: the name is a hash of all that determines it."""
        experiment = self.federation.experiment
        key = f"{asdict(trial)} {type(trial.objective)} {experiment.data} {experiment.model.width}"
        return self.folder / f"{trial.model}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"

    def model(self, trial: Trial) -> nn.Module:
        """The trained model, frozen in evaluation mode; from its file where there is one."""
        path = self.file(trial)
        if not path.is_file():
            self.on_trial(trial)
            described = {**self.federation.described, "name": trial.model}
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".building")
            write_model(beside, snapshot(self._trained(trial, described)), described)
            beside.replace(path)
        return read_model(path).to(self.federation.device)

    def _trained(self, trial: Trial, described: Mapping[str, object]) -> nn.Module:
        student = models.build(**described, seed=trial.seed).to(self.federation.device)  # type: ignore[arg-type]
        rng = generator(trial.seed, Purpose.CLIENT)
        trial.training.fit(student, self.train, self._loss(trial, student), rng=rng)
        return student

    def _loss(self, trial: Trial, student: nn.Module) -> Loss:
        if trial.teacher is None:
            return cross_entropy
        teacher = self.model(trial.teacher)
        if isinstance(trial.objective, FeatureDistillation):
            image = torch.zeros(1, *self.federation.data.shape, device=self.federation.device)
            rng = generator(trial.seed, Purpose.PROJECTION)
            return feature_loss(student, teacher, image, objective=trial.objective, rng=rng)
        assert trial.objective is not None
        return FromTeacher(teacher, trial.objective)

    def validation(self, trial: Trial) -> float:
        """Accuracy on the validation set, the one that may choose, percent."""
        return 100 * evaluate(self.model(trial), self.federation.data.validation.to(self.federation.device))["accuracy"]

    def logits(self, trial: Trial) -> Tensor:
        """Logits (N, K) on the test set."""
        return logits(self.model(trial), self.federation.data.test.to(self.federation.device))

    def accuracy(self, output: Tensor) -> float:
        """Of logits on the test set, percent."""
        return 100 * float((output.argmax(dim=1).cpu() == self.federation.data.test.labels).double().mean())


def pairs_of(text: str) -> list[tuple[str, str]]:
    """ "resnet56-resnet20,resnet20-resnet8" -> [(teacher, student), ...].

    Raises:
        UserError: no pair, or an unknown model.
    """
    found = [tuple(part.strip().split("-")) for part in text.split(",")]
    for names in found:
        if len(names) != 2 or not set(names) <= models.MODELS.keys():
            raise UserError(f"--pairs {'-'.join(names)!r}: write TEACHER-STUDENT of {', '.join(models.MODELS)}")
    return [(teacher, student) for teacher, student in found]


Number = TypeVar("Number", int, float)


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """ "0,1,2" -> [0, 1, 2]. Raises UserError where a part is no number of this kind."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text!r}: write numbers separated by commas") from error


def measure(
    experiment: Experiment,
    *,
    pairs: Iterable[tuple[str, str]],
    seeds: Sequence[int],
    grid: Grid,
    teacher_epochs: int,
    folder: Path,
    on_trial: Callable[[Trial], None] = unseen,
) -> list[Row]:
    """The table of the study; `experiment.training` is the students', with `teacher_epochs` the teachers'."""
    federation = Federation.build(experiment)
    settled = resolved(experiment, federation)
    study = Study(replace(federation, experiment=settled), folder, on_trial)
    rows = []
    for teacher, student in pairs:
        taught_by = Trial(teacher, seeds[0], replace(settled.training, epochs=teacher_epochs))
        rows += _pair(study, taught_by, Trial(student, seeds[0], settled.training), seeds, grid)
    return rows


def _pair(study: Study, teacher: Trial, alone: Trial, seeds: Sequence[int], grid: Grid) -> list[Row]:
    chosen = {"baseline": alone}
    for method, settings in grid.methods().items():
        trials = [replace(alone, teacher=teacher, objective=setting) for setting in settings]
        chosen[method] = max(trials, key=study.validation)
    wanted = study.logits(teacher)
    outputs = {method: [study.logits(replace(trial, seed=seed)) for seed in seeds] for method, trial in chosen.items()}
    baseline = [study.accuracy(each) for each in outputs["baseline"]]
    described = {"teacher": (teacher, [wanted]), **{m: (trial, outputs[m]) for m, trial in chosen.items()}}
    return [
        _row(study, f"{teacher.model}-{alone.model}", method, trial, each, wanted, baseline)
        for method, (trial, each) in described.items()
    ]


def _row(
    study: Study,
    pair: str,
    method: str,
    trial: Trial,
    outputs: Sequence[Tensor],
    wanted: Tensor,
    baseline: Sequence[float],
) -> Row:
    tested = [study.accuracy(each) for each in outputs]
    mean, std = mean_std(tested)
    gain, p = mean - statistics.fmean(baseline), welch(tested, baseline)
    return Row(
        pair=pair,
        method=method,
        setting=_setting(trial.objective),
        seeds=len(outputs),
        params=sum(parameter.numel() for parameter in study.model(trial).parameters()),
        validation=study.validation(trial),
        test=mean,
        std=std,
        gain=gain,
        p=p,
        effect="none shown" if not p < NOISE else "+" if gain > 0 else "-",
        agreement=100 * statistics.fmean(agreement(each, wanted) for each in outputs),
        kl_1=statistics.fmean(divergence(each, wanted) for each in outputs),
        kl_4=statistics.fmean(divergence(each, wanted, temperature=4.0) for each in outputs),
    )


def _setting(objective: Objective | None) -> str:
    if objective is None:
        return "-"
    if isinstance(objective, FeatureDistillation):
        return f"alpha {objective.alpha} beta {objective.beta}"
    return f"alpha {objective.alpha} T {objective.temperature:g}"
