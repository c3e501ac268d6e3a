"""Runs a client on tiny data and says in plain words what is wrong with it.

for finding in examine(my_client):
    print(finding.check, finding.problem or "ok")

The client runs on a few digits and a small network with BatchNorm: as it is, again after another client, with other global
random numbers, on a model that another client left behind, and under a mask. Nothing travels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fl_sim import data, models
from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.types import Scalar
from fl_sim.runtime.client.doctor_behaviour_checks import (
    descends,
    deterministic,
    fast,
    keeps_nothing,
    leaves_nothing,
    leaves_the_task,
    obeys_the_mask,
    owns_its_update,
    starts_from_the_task,
)
from fl_sim.runtime.client.doctor_update_checks import (
    complete,
    counts_examples,
    finite,
    keeps_tensors,
    learns,
    masks_what_is_prunable,
    measures_numbers,
    no_counters,
    returns_parameters,
    runs,
    same_dtypes,
    sends_what_it_declares,
    trains_statistics,
)
from fl_sim.runtime.client.trial import Examination
from fl_sim.training.client import Client

SAMPLES = 96


@dataclass(frozen=True)
class Finding:
    """Result of a check: what is right, and what is wrong with this client; empty = nothing."""

    check: str
    problem: str


def examine(client: Client, *, model: str = "cnn_bn", config: Mapping[str, Scalar] | None = None) -> list[Finding]:
    """Try a client; one finding a check, in order. Where the client gives nothing usable, only the checks that say so.

    Raises:
        UserError: no such model.
    """
    torch.set_num_threads(1)
    digits = data.load("digits")
    channels, height, _ = digits.shape
    built = models.build(model, num_classes=digits.num_classes, in_channels=channels, image_size=height)
    samples = digits.train.subset(np.arange(SAMPLES))
    examination = Examination(client, built, samples, config or {})
    findings: list[Finding] = []
    for check in (*NEEDED, *CHECKS):
        try:
            problem = check(examination)
        except USERS_OWN as error:  # the client's own, whatever it is: this is what a doctor is for
            problem = f"it raised {error_line(error)}"
        said_already = problem in [finding.problem for finding in findings]
        findings.append(Finding((check.__doc__ or "").rstrip("."), "" if said_already else problem))
        if problem and check in NEEDED:
            break
    return findings


Check = Callable[[Examination], str]
NEEDED: tuple[Check, ...] = (runs, complete, finite)
CHECKS: tuple[Check, ...] = (
    sends_what_it_declares,
    no_counters,
    same_dtypes,
    learns,
    returns_parameters,
    trains_statistics,
    counts_examples,
    measures_numbers,
    keeps_tensors,
    leaves_the_task,
    leaves_nothing,
    owns_its_update,
    keeps_nothing,
    deterministic,
    starts_from_the_task,
    masks_what_is_prunable,
    obeys_the_mask,
    descends,
    fast,
)
