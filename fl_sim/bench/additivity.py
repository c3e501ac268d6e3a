"""Whether distortions add up: pruning many layers at once against the sum of pruning each alone (arXiv 2308.10438).

For random allocations: joint = mean ||f(x; W) - f(x; W~)||^2, predicted = sum of the layers' curves at their levels. The
property belongs to small changes; the table shows where it ends, and whether the order of allocations survives it, which
is all that an allocation needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fl_sim.core.seeding import Purpose, generator, numpy_generator
from fl_sim.data import load as load_data
from fl_sim.models import build, prunable_names
from fl_sim.models.modes import evaluating
from fl_sim.models.parameters import load, snapshot
from fl_sim.sparsity import apply_mask, magnitude, topk_mask
from fl_sim.sparsity.curves import MeasureCurves, calibration, squared_error
from fl_sim.sparsity.rate_distortion import kept_weights
from fl_sim.training.loop import Training
from fl_sim.training.model_file import data_for, open_saved

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """Random allocations around one sparsity, or all of them.

    Attributes:
        sparsity: asked for on average over the layers, or "all".
        achieved: mean share of pruned weights.
        joint, predicted: means over the allocations, squared logits.
        slope: of joint = slope * predicted, least squares.
        r2: share of the variance of joint that this line explains; can be below 0.
        spearman: rank correlation of joint and predicted.
    """

    sparsity: str
    achieved: float
    joint: float
    predicted: float
    slope: float
    r2: float
    spearman: float


def measure(
    *,
    checkpoint: Path | None = None,
    source: str = "digits",
    images: int = 128,
    levels: int = 21,
    allocations: int = 20,
    sparsities: Sequence[float] = SPARSITIES,
) -> list[Row]:
    """The table for a saved model on a data source; without one, for a ResNet-8 trained on `source` for some seconds."""
    if checkpoint is None:
        data = load_data(source)
        model = _trained(source)
    else:
        saved = open_saved(checkpoint)
        data, model = data_for(saved, source), saved.model
    return rows(model, calibration(data.train, images), levels=levels, allocations=allocations, sparsities=sparsities)


def _trained(source: str) -> nn.Module:
    data = load_data(source)
    channels, size, _ = data.shape
    model = build("resnet8", in_channels=channels, image_size=size, num_classes=data.num_classes)
    training = Training(lr=0.1, momentum=0.9, steps=200, batch_size=64, schedule="cosine")
    training.fit(model, data.train, rng=generator(0, Purpose.CLIENT))
    return model


def rows(
    model: nn.Module,
    images: Tensor,
    *,
    levels: int = 21,
    allocations: int = 20,
    sparsities: Sequence[float] = SPARSITIES,
    seed: int = 0,
) -> list[Row]:
    """Build the table: Spearman rank correlation at each sparsity, and over all allocations."""
    curves = MeasureCurves(levels)(model, images)
    rng = numpy_generator(seed, Purpose.CALIBRATION)
    found = {s: np.array([_compared(model, images, curves, s, rng) for _ in range(allocations)]) for s in sparsities}
    return [_row(f"{s:g}", pairs) for s, pairs in found.items()] + [_row("all", np.concatenate(list(found.values())))]


def _compared(
    model: nn.Module, images: Tensor, curves: Mapping[str, Sequence[float]], sparsity: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """(achieved sparsity, joint distortion, predicted distortion) of one random allocation."""
    params = snapshot(model)
    weights = {name: params[name] for name in prunable_names(model)}
    last = len(next(iter(curves.values()))) - 1
    # Normal in the logit, so that layers spread around the asked sparsity on both sides; no layer is removed whole.
    drawn = 1 / (1 + (1 - sparsity) / sparsity * np.exp(0.5 * rng.standard_normal(len(weights))))
    chosen = dict(zip(weights, np.clip(np.round(drawn * last), 0, last - 1).astype(int).tolist(), strict=True))
    keep = {name: kept_weights(weights[name].numel(), last + 1)[level] for name, level in chosen.items()}
    joint = joint_distortion(model, images, keep)
    total = sum(value.numel() for value in weights.values())
    return 1 - sum(keep.values()) / total, joint, sum(curves[name][level] for name, level in chosen.items())


def joint_distortion(model: nn.Module, images: Tensor, keep: Mapping[str, int]) -> float:
    """Mean squared change of the logits when all layers are pruned by magnitude at once; the model is left as it was."""
    params = snapshot(model)
    with evaluating(model), torch.no_grad():
        reference = model(images)
        try:
            load(model, apply_mask(params, topk_mask(magnitude({name: params[name] for name in keep}), keep)))
            return float(squared_error(model(images), reference).mean())
        finally:
            load(model, params)


def spearman(first: Floats, second: Floats) -> float:
    """Spearman's rank correlation; NaN where one side is constant, which has no order to compare."""
    from scipy.stats import spearmanr  # here: importing it takes longer than every other command

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def _row(sparsity: str, triples: Floats) -> Row:
    achieved, joint, predicted = triples.T
    squares = float(predicted @ predicted)
    slope = float(joint @ predicted) / squares if squares else float("nan")
    spread = float(((joint - joint.mean()) ** 2).sum())
    r2 = 1 - float(((joint - slope * predicted) ** 2).sum()) / spread if spread else float("nan")
    means = (float(achieved.mean()), float(joint.mean()), float(predicted.mean()))
    return Row(sparsity, *means, slope, r2, spearman(joint, predicted))
