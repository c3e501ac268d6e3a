"""Trackers of other projects: each an observer of a run, opened for it and closed after it. None is required.

with tracked(["tensorboard"], experiment) as observers:
    run(experiment, together(observers))

A tracker is a function of (experiment, run folder) that opens a context and gives an `Observer`; one of your own is named
by import path. They see the lines of rounds.jsonl, and change nothing in the results.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fl_sim.config.experiment import Experiment, run_folder
from fl_sim.config.toml import Json
from fl_sim.core.lookup import find
from fl_sim.core.observer import Observer
from fl_sim.core.types import UserError
from fl_sim.report.groups import flat

Track = Callable[[Experiment, Path], AbstractContextManager[Observer]]
PROJECT = "fl-sim"


@dataclass(frozen=True)
class EachRound:
    """An observer that hands on (round, its numbers)."""

    log: Callable[[int, Mapping[str, float]], None]

    def say(self, line: str) -> None:
        """Ignore."""

    def reply(self, answered: int, cohort: int) -> None:
        """Trackers count rounds, not answers."""

    def round(self, row: Mapping[str, float]) -> None:
        """Hand on a line of rounds.jsonl."""
        self.log(int(row["round"]), {name: value for name, value in row.items() if name != "round"})


@dataclass(frozen=True)
class CompositeObserver:
    """Several observers as one."""

    observers: Sequence[Observer]

    def say(self, line: str) -> None:
        """Pass the event to every observer."""
        for observer in self.observers:
            observer.say(line)

    def reply(self, answered: int, cohort: int) -> None:
        """Pass the event to every observer."""
        for observer in self.observers:
            observer.reply(answered, cohort)

    def round(self, row: Mapping[str, float]) -> None:
        """Pass the event to every observer."""
        for observer in self.observers:
            observer.round(row)


@contextmanager
def tensorboard(experiment: Experiment, folder: Path) -> Iterator[Observer]:
    """TensorBoard: event files in the run folder; `tensorboard --logdir runs`."""
    with _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard")) as writer:

        def log(number: int, row: Mapping[str, float]) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, number)

        writer.add_text("config", f"```\n{experiment.to_toml()}\n```")
        yield EachRound(log)


@contextmanager
def mlflow(experiment: Experiment, folder: Path) -> Iterator[Observer]:
    """MLflow: at MLFLOW_TRACKING_URI, else in `mlflow.db` beside the run folders."""
    store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent.resolve() / 'mlflow.db'}")
    client = _module("mlflow.tracking", "mlflow").MlflowClient(tracking_uri=store)
    known = client.get_experiment_by_name(PROJECT)
    where = client.create_experiment(PROJECT) if known is None else known.experiment_id
    identity = client.create_run(where, run_name=folder.name).info.run_id
    for key, value in flat(_config(experiment)):
        client.log_param(identity, key, value)

    def log(number: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            client.log_metric(identity, name, value, step=number)

    try:
        yield EachRound(log)
    except BaseException:
        client.set_terminated(identity, status="FAILED")
        raise
    client.set_terminated(identity)


@contextmanager
def wandb(experiment: Experiment, folder: Path) -> Iterator[Observer]:
    """Weights & Biases: offline in the run folder, unless WANDB_MODE says otherwise; `wandb sync` uploads it."""
    package = _module("wandb", "wandb")
    mode = os.environ.get("WANDB_MODE", "offline")
    settings = package.Settings(silent=True, console="off")
    run = package.init(
        project=PROJECT, name=folder.name, dir=str(folder), mode=mode, config=_config(experiment), settings=settings
    )
    with run:
        yield EachRound(lambda number, row: run.log(dict(row), step=number))


TRACKERS: Mapping[str, Track] = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}


@contextmanager
def tracked(names: Sequence[str], experiment: Experiment) -> Iterator[list[Observer]]:
    """Open trackers by name or import path; all are closed at the end, however the run ends.

    Raises:
        UserError: no such tracker, or its package is not installed.
    """
    opening = [find("--track", name, TRACKERS) for name in names]
    folder = run_folder(experiment)
    with ExitStack() as stack:
        if opening:
            folder.mkdir(parents=True, exist_ok=True)
        yield [stack.enter_context(track(experiment, folder)) for track in opening]


def together(observers: Sequence[Observer]) -> Observer:
    """Several observers as one."""
    return CompositeObserver(tuple(observers))


def _config(experiment: Experiment) -> dict[str, Json]:
    return experiment.model_dump(mode="json", exclude_none=True)


def _module(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--track {extra} needs a package: pip install 'fl-sim[{extra}]'") from error
