"""Density benchmark: one trained model pruned by several methods, tested before and after training under the mask.

It also shows layer collapse (arXiv 2209.14624): at extreme sparsity a global ranking leaves some layers without a weight,
unless each keeps a minimum. All rows train for as many steps, from the same seed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

from torch import nn

from fl_sim.core.lookup import find
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import UserError
from fl_sim.data import Data
from fl_sim.sparsity.curves import MeasureCurves, calibration
from fl_sim.sparsity.one_model import METHODS, PruneModel, Request, layer_rows, support
from fl_sim.training.evaluation import evaluate
from fl_sim.training.loop import Training
from fl_sim.training.model_file import data_for, open_saved


@dataclass(frozen=True)
class Row:
    """Accuracy of one pruned model.

    Attributes:
        method: name of `fl_sim.sparsity.one_model.METHODS`, with the minimum of each layer behind a "+".
        density: share of the prunable weights that stay.
        empty: layers that keep nothing.
        fewest: weights of the layer that keeps fewest.
        macs: share of the multiply-accumulates that is left.
        payload_bytes: of the whole encoded model.
        one_shot, retrained: test accuracy after pruning, and after training under the mask; NaN without training.
    """

    method: str
    density: float
    empty: int
    fewest: int
    macs: float
    payload_bytes: int
    one_shot: float
    retrained: float


@dataclass(frozen=True)
class Asked:
    """A method with the minimum of each layer."""

    name: str
    method: PruneModel
    min_keep: int = 0

    @classmethod
    def of(cls, text: str) -> Asked:
        """ "global", or "global+10" with at least ten weights in each layer. Raises UserError for anything else."""
        name, plus, least = text.partition("+")
        if plus and not least.isdigit():
            raise UserError(f"--methods {text!r}: write METHOD or METHOD+WEIGHTS, for instance global+10")
        return cls(text, find("--methods", name, METHODS), int(least or 0))


def measure(
    checkpoint: Path,
    source: str,
    *,
    methods: Sequence[Asked],
    densities: Sequence[float],
    images: int,
    levels: int,
    precision: str,
    training: Training | None,
    seed: int = 0,
) -> Iterator[Row]:
    """A row for each density and method; without `training` they are only tested."""
    saved = open_saved(checkpoint)
    data = data_for(saved, source)
    given, curves = calibration(data.train, images), MeasureCurves(levels=levels)
    for density in densities:
        for asked in methods:
            pruned = asked.method(saved.model, Request(density, asked.min_keep, images=given, measure=curves))
            *layers, whole = layer_rows(saved.model, pruned, data.shape, tokens=saved.tokens)
            kept = [row.kept for row in layers]
            one_shot = evaluate(pruned, data.test, precision=precision)["accuracy"]
            later = nan if training is None else _retrained(pruned, data, training, seed)
            share = whole.macs_kept / whole.macs
            yield Row(asked.name, density, kept.count(0), min(kept), share, whole.payload_bytes, one_shot, later)


def _retrained(pruned: nn.Module, data: Data, training: Training, seed: int) -> float:
    student, mask = copy.deepcopy(pruned), support(pruned)
    training.fit(student, data.train, mask=mask, rng=generator(seed, Purpose.CLIENT))
    return evaluate(student, data.test, precision=training.precision)["accuracy"]
