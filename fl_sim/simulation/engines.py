"""`engine = "auto"`: which engine an experiment runs on, by a short rule that says why."""

from __future__ import annotations

import multiprocessing

import torch

from fl_sim.config.experiment import Engine, Experiment
from fl_sim.runtime.grids.workers import cores

FEW = 4
"""A smaller cohort is over before further processes have paid for their start."""


def settled(experiment: Experiment) -> tuple[Experiment, str | None]:
    """The experiment with its engine named, and why that one; None where the config names it already.

    Ray where `ray.address` asks for a cluster. Inline on a GPU (one process feeds it best), on one core, for small cohorts,
    and where the system cannot fork. Else workers.
    """
    if experiment.engine != "auto":
        return experiment, None
    engine, why = _choice(experiment)
    return experiment.model_copy(update={"engine": engine}), f"engine: {engine} ({why})"


def _choice(experiment: Experiment) -> tuple[Engine, str]:
    count, size, device = experiment.workers.count or cores(), experiment.cohort.size, experiment.device
    if experiment.ray.address is not None:
        return "ray", "ray.address is set"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return "inline", "one process feeds the GPU"
    if count < 2:
        return "inline", "one core"
    if size < FEW:
        return "inline", f"{size} clients a round, fewer than {FEW}"
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "inline", "this system cannot fork"
    return "workers", f"{count} processes, {size} clients a round"
