"""Capacity study of arXiv 2605.31191: which student profits from which teacher, for any pair of models.

    rows = measure(Experiment.load("configs/kd_capacity.toml"), seeds=[0, 1, 2])     # what `fl-sim sweep` does with [study]

For every pair a teacher and a student alone are trained, then the student once for each setting of each method with the
first seed; the validation set chooses the setting; the chosen one and the baseline are trained with all seeds and measured
on the test set, once. Every training leaves a model file that is read instead when the study is run again.

Deviations: one teacher, the first seed's, teaches all seeds; the learning rate falls along a cosine to 0 by step (the
paper: to 1e-4 by epoch); the last model counts, not the best on validation.
"""

from __future__ import annotations

import hashlib
import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fl_sim import models
from fl_sim.bench.fidelity import agreement, divergence, mean_std, welch
from fl_sim.config.experiment import Experiment
from fl_sim.config.sections import StudySection
from fl_sim.core.files import write_atomically
from fl_sim.core.lookup import find
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import UserError
from fl_sim.data import Split
from fl_sim.models.parameters import snapshot
from fl_sim.simulation.client_side import AUGMENT
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.identity import IDENTITY, Identity, hash_of, recorded
from fl_sim.training.evaluation import evaluate, logits
from fl_sim.training.feature_loss import feature_loss
from fl_sim.training.loop import Training
from fl_sim.training.losses import Distillation, FeatureDistillation, FromTeacher, Loss, cross_entropy
from fl_sim.training.model_file import read_model, write_model

log = logging.getLogger("fl_sim")
Objective = Distillation | FeatureDistillation
NOISE = 0.05
"""Level of Welch's test below which a difference is called one."""


@dataclass(frozen=True)
class Trial:
    """A trial: one training of a model, alone or under a teacher with an objective."""

    model: str
    seed: int
    training: Training
    teacher: Trial | None = None
    objective: Objective | None = None


def no_progress(trial: Trial) -> None:
    """A display that shows nothing."""


@dataclass(frozen=True)
class Row:
    """A row of the table: one method of one pair, with test accuracies in percent over the seeds.

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


def methods(section: StudySection) -> Mapping[str, list[Objective]]:
    """Method -> the settings among which validation chooses."""
    logit: list[Objective] = [Distillation(t, a) for a in section.alphas for t in section.temperatures]
    return {"logit": logit, "feature": [FeatureDistillation(a, section.beta) for a in section.alphas]}


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
    on_trial: Callable[[Trial], None] = no_progress

    @cached_property
    def train(self) -> Split:
        """Training images, augmented as the experiment says."""
        experiment = self.federation.experiment
        return self.federation.data.train.augmented(AUGMENT[experiment.data.augment]).to(self.federation.first.device)

    @cached_property
    def identity(self) -> Identity:
        """Hashes of the data and of the user's code, as of a run."""
        return Identity.of(self.federation.code, hash_of(self.federation.data))

    def file(self, trial: Trial) -> Path:
        """Path of a trial's model; its name is a hash of everything that determines it, data and the user's code included."""
        experiment = self.federation.experiment
        made_of = f"{self.identity.data} {sorted(self.identity.code.items())}"
        key = f"{asdict(trial)} {type(trial.objective)} {experiment.data} {experiment.model.width} {made_of}"
        return self.folder / f"{trial.model}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"

    def model(self, trial: Trial) -> nn.Module:
        """Train a model, or read it where an earlier study saved it; returned frozen and in evaluation mode."""
        path = self.file(trial)
        if not path.is_file():
            self.on_trial(trial)
            described = {**self.federation.first.described, "name": trial.model}
            self.folder.mkdir(parents=True, exist_ok=True)
            # The process's own, so that two studies that share a training may run at once.
            beside = path.with_suffix(f".{os.getpid()}")
            write_model(beside, snapshot(self._trained(trial, described)), described)
            beside.replace(path)
        return read_model(path).to(self.federation.first.device)

    def _trained(self, trial: Trial, described: Mapping[str, object]) -> nn.Module:
        student = models.build(**described, seed=trial.seed).to(self.federation.first.device)  # type: ignore[arg-type]
        rng = generator(trial.seed, Purpose.CLIENT)
        trial.training.fit(student, self.train, self._loss(trial, student), rng=rng)
        return student

    def _loss(self, trial: Trial, student: nn.Module) -> Loss:
        if trial.teacher is None:
            return cross_entropy
        teacher = self.model(trial.teacher)
        if isinstance(trial.objective, FeatureDistillation):
            image = torch.zeros(1, *self.federation.data.shape, device=self.federation.first.device)
            rng = generator(trial.seed, Purpose.PROJECTION)
            return feature_loss(student, teacher, image, objective=trial.objective, rng=rng)
        assert trial.objective is not None
        return FromTeacher(teacher, trial.objective)

    def validation(self, trial: Trial) -> float:
        """Accuracy on the validation set, the one that may choose, percent."""
        split = self.federation.data.validation.to(self.federation.first.device)
        return 100 * evaluate(self.model(trial), split, precision=trial.training.precision)["accuracy"]

    def logits(self, trial: Trial) -> Tensor:
        """Logits (N, K) on the test set."""
        split = self.federation.data.test.to(self.federation.first.device)
        return logits(self.model(trial), split, precision=trial.training.precision)

    def accuracy(self, output: Tensor) -> float:
        """Of logits on the test set, percent."""
        return 100 * float((output.argmax(dim=1).cpu() == self.federation.data.test.labels).double().mean())


def folder(experiment: Experiment) -> Path:
    """Folder of the models and the table of an experiment's study."""
    return Path(experiment.out) / f"{experiment.name}-study"


def measure(
    experiment: Experiment, *, seeds: Sequence[int], on_trial: Callable[[Trial], None] = no_progress
) -> list[Row]:
    """The table of the experiment's study; `[training]` is the students'.

    Raises:
        UserError: an unknown model, data that is missing, or a seed given twice.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))}: each once; the same training twice has no spread")
    section = experiment.study or StudySection()
    for name in {name for pair in section.pairs for name in pair}:
        find("study.pairs", name, models.MODELS)
    if experiment.training.changes:
        raise UserError("study: training.warmup and training.decay are over federated rounds; needed: without them")
    federation = Federation.build(experiment)
    settled = federation.experiment
    study = Study(federation, folder(experiment), on_trial)
    _record_identity(study, experiment)
    rows = []
    for teacher, student in section.pairs:
        taught_by = Trial(teacher, seeds[0], longer(settled.training, section.teacher))
        rows += _pair(study, taught_by, Trial(student, seeds[0], settled.training), seeds, methods(section))
    return rows


def _record_identity(study: Study, experiment: Experiment) -> None:
    """Say what changed since the study's folder was last used, and write what is used now.

    Trainings of other data or code have other files: they are run again, and the earlier ones stay.
    """
    before = recorded(study.folder)
    if before is not None and (changed := before.changes(study.identity, experiment.data.source)):
        log.warning("%s: since the last study %s changed: its trainings run again", study.folder, ", ".join(changed))
    elif before is not None and (versions := before.other_versions(study.identity)):
        log.warning("%s: computed by other versions: %s", study.folder, versions)
    study.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(study.folder / IDENTITY, (study.identity.model_dump_json(indent=2) + "\n").encode())


def longer(training: Training, factor: float) -> Training:
    """Training settings with `factor` times as many epochs or steps."""
    if training.steps is not None:
        return replace(training, steps=round(factor * training.steps))
    return replace(training, epochs=max(1, round(factor * training.epochs)))


def _pair(
    study: Study, teacher: Trial, alone: Trial, seeds: Sequence[int], grid: Mapping[str, list[Objective]]
) -> list[Row]:
    candidates = {method: [replace(alone, teacher=teacher, objective=o) for o in grid[method]] for method in grid}
    chosen = {
        method: max(((study.validation(trial), trial) for trial in trials), key=lambda scored: scored[0])
        for method, trials in {"teacher": [teacher], "baseline": [alone], **candidates}.items()
    }
    outputs = {
        method: [study.logits(replace(trial, seed=seed)) for seed in (seeds if trial is not teacher else seeds[:1])]
        for method, (_, trial) in chosen.items()
    }
    wanted, baseline = outputs["teacher"][0], [study.accuracy(each) for each in outputs["baseline"]]
    return [
        _row(study, f"{teacher.model}-{alone.model}", method, *chosen[method], outputs[method], wanted, baseline)
        for method in chosen
    ]


def _row(
    study: Study,
    pair: str,
    method: str,
    validation: float,
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
        validation=validation,
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
