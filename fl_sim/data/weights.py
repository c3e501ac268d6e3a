"""Weights of training samples: how much each counts in the loss, and its client in the mean where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.core.types import UserError
from fl_sim.data.arrays import Labels, as_array

BALANCED = "balanced"
POSITIVE = "numbers above 0"
PER_SAMPLE = 1000
"""What a sample of mean weight counts in `Update.num_examples`, which is a whole number."""


class WeightedBatch(tuple[Tensor, Tensor]):
    """A batch, (inputs, targets), whose samples have weights (B,): unpacks as any other batch does."""

    weights: Tensor

    def __new__(cls, inputs: Tensor, targets: Tensor, weights: Tensor) -> Self:
        made = super().__new__(cls, (inputs, targets))
        made.weights = weights
        return made


Batch = tuple[Tensor, Tensor]
"""(inputs (B, ...), targets (B, ...)); a `WeightedBatch` where samples have weights."""


def weights_of(batch: Batch) -> Tensor | None:
    """Weights of a batch's samples (B,); None where they have none."""
    return cast("Tensor | None", getattr(batch, "weights", None))


def parts_of(batch: Batch, size: int) -> Sequence[Batch]:
    """Cut a batch into batches of at most so many samples."""
    inputs, targets, weights = *(part.split(size) for part in batch), weights_of(batch)
    if weights is None:
        return list(zip(inputs, targets, strict=True))
    return list(map(WeightedBatch, inputs, targets, weights.split(size)))


def as_weights(value: object, samples: int, where: str = "data: weights") -> NDArray[np.float32]:
    """Weights with mean 1, float32 (N,). Raises UserError where one is missing or not above 0."""
    given = as_array(value, "weights")
    if given.shape != (samples,) or given.dtype.kind not in "fiu":
        raise UserError(f"{where} are {given.dtype} {given.shape}; needed: a number for each of {samples} samples")
    numbers = given.astype(np.float64)
    if not (fine := np.isfinite(numbers) & (numbers > 0)).all():
        at = int((~fine).argmax())
        raise UserError(f"{where}: {given[at]} of sample {at} (from 0); needed: {POSITIVE}, none missing")
    return _with_mean_1(numbers)


def _with_mean_1(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", (numbers / numbers.mean()).astype(np.float32))


def by_class(labels: Labels, classes: int, asked: str | Sequence[float]) -> NDArray[np.float32]:
    """The weight of each sample's class, with mean 1 over the samples, float32 (N,).

    Args:
        labels: classes (N,).
        classes: number of classes, K.
        asked: "balanced", N / (K N_k) for a class of N_k samples (King and Zeng, 2001), or a weight for each class.

    Raises:
        UserError: neither, or not a number above 0 for each class.
    """
    if isinstance(asked, str):
        if asked != BALANCED:
            raise UserError(
                f"data.class_weights = {asked!r}: allowed: {BALANCED!r}, or a list of a number for each class"
            )
        of_each = len(labels) / (classes * np.maximum(1, np.bincount(labels, minlength=classes)))
    else:
        if len(asked) != classes or not all(0 < weight < np.inf for weight in asked):
            raise UserError(
                f"data.class_weights = {list(asked)}: needed: {POSITIVE}, one for each of {classes} classes"
            )
        of_each = np.array(asked)
    return _with_mean_1(of_each[labels])


def combined(weights: Tensor | None, factors: NDArray[np.float32]) -> Tensor:
    """Weights of samples times those of their classes, with mean 1."""
    both = torch.from_numpy(factors) if weights is None else weights * torch.from_numpy(factors)
    return both / both.mean()
