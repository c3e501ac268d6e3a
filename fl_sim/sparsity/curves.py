"""Distortion curves: how far the logits move when one tensor alone is pruned by magnitude (arXiv 2308.10438, section 3).

    curves = MeasureCurves(levels=21)(model, calibration(data.validation, 128))
    keep = RateDistortion(curves)(magnitude(params), 0.1)

The calibration images are one fixed tensor and the model is in evaluation mode, so a curve starts at exactly 0. The
authors' public code draws its augmentation anew for every pass, and its curves start at that noise.

The mean over samples is a mean, so curves of a common model measured on parts of the images, averaged with the number of
images as weight, are the curve of all images: clients can measure, and upload kilobytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import UserError
from fl_sim.data import Data, Split
from fl_sim.models import prunable_names
from fl_sim.models.modes import evaluating, restored
from fl_sim.models.partial_forward import resumed
from fl_sim.sparsity.rate_distortion import kept_weights

Curves = Mapping[str, Sequence[float]]
"""Prunable name -> distortion when floor(q/Q * n) of its n weights are pruned, smallest first, q = 0 ... Q."""

Progress = Callable[[int, int], None]
"""Called with (curves measured, curves in all)."""


def squared_error(logits: Tensor, reference: Tensor) -> Tensor:
    """Squared Euclidean distance of each sample's logits, float64 (B,)."""
    return (logits - reference).double().square().flatten(start_dim=1).sum(dim=1)


@dataclass(frozen=True)
class Summary:
    """Summary statistic of the samples' errors, and how those of parts combine to that of the whole.

    Attributes:
        of: errors (N,) -> their distortion.
        pool: (distortions of parts, number of samples of each) -> the distortion of all samples.
    """

    name: str
    of: Callable[[Tensor], float]
    pool: Callable[[Sequence[float], Sequence[int]], float]


def _weighted(values: Sequence[float], counts: Sequence[int]) -> float:
    return sum(n * value for value, n in zip(values, counts, strict=True)) / sum(counts)


MEAN = Summary("mean", lambda errors: float(errors.mean()), _weighted)
WORST = Summary("worst", lambda errors: float(errors.max()), lambda values, counts: max(values))
"""The largest error of a sample; the reference code's choice for its headline results. It is not additive over layers."""

SUMMARIES: Mapping[str, Summary] = {summary.name: summary for summary in (MEAN, WORST)}


def no_progress(done: int, total: int) -> None:
    """A progress display that shows nothing."""


@dataclass(frozen=True)
class MeasureCurves:
    """Measures the curve of every prunable tensor, one tensor at a time; the others keep their weights.

    Forward passes: levels - 1 for each tensor, of the layers from it on only (`fl_sim.models.partial_forward`). Levels that prune
    nothing but zeros cost none.

    Attributes:
        levels: points of a curve, from all weights to none; the paper has 101.
        summary: "mean" or "worst" over the samples.
        batch_size: images that are kept in memory layer by layer at once.
    """

    levels: int = 21
    summary: str = "mean"
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise UserError(f"levels = {self.levels}: a curve has at least 2")
        if self.batch_size < 1:
            raise UserError(f"batch_size = {self.batch_size}: must be at least 1")
        if self.summary not in SUMMARIES:
            raise UserError(f"summary = {self.summary!r}: allowed: {', '.join(SUMMARIES)}")

    def __call__(
        self, model: nn.Module, images: Tensor, names: Iterable[str] | None = None, *, progress: Progress = no_progress
    ) -> dict[str, list[float]]:
        """The curves of `names` (default: all prunable tensors) on `images`, (N, ...) as the model takes them.

        The model is measured in evaluation mode and left as it was, bit for bit. Raises UserError without images.
        """
        if not len(images):
            raise UserError("calibration: there are no images")
        chosen = prunable_names(model) if names is None else list(names)
        summary = SUMMARIES[self.summary]
        curves: dict[str, list[float]] = {}
        with evaluating(model):
            for name in chosen:
                errors = self._errors(model, name, images)
                curves[name] = [summary.of(level) for level in errors]
                progress(len(curves), len(chosen))
        return curves

    def _errors(self, model: nn.Module, name: str, images: Tensor) -> Tensor:
        """(levels, N) float64: the error of every sample at every level."""
        errors = torch.zeros(self.levels, len(images), dtype=torch.float64)
        with restored(model.get_parameter(name)) as weight:
            original = weight.clone()
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                weight.copy_(original)
                with resumed(model, name, images[part]) as (reference, again):
                    for level, changed in enumerate(_pruned(weight, self.levels), start=1):
                        new = squared_error(again(), reference).cpu() if changed else errors[level - 1, part]
                        errors[level, part] = new
        return errors


def _pruned(weight: Tensor, levels: int) -> Iterator[bool]:
    """Prune `weight` in place to level 1, 2, ...; yields after each whether anything changed.

    Of equal magnitudes the later goes first, as in `topk_mask`.
    """
    flat = weight.flatten().clone()  # channels-last weights of 1x1 refuse to be copied from their own memory
    kept = kept_weights(len(flat), levels)
    order = flat.abs().argsort(descending=True, stable=True)
    for before, after in pairwise(kept):
        going = order[after:before]
        changed = bool(flat[going].any())
        if changed:
            flat[going] = 0.0
            weight.copy_(flat.view(weight.shape))
        yield changed


def calibration(split: Split, count: int) -> Tensor:
    """`count` samples of a split at equal distances, or all if it has fewer, as a model gets them, fixed.

    Images are float32 (N, C, H, W), normalised; tokens are int64 (N, T).
    """
    _check_count(count)
    number = min(count, len(split))
    part = split.subset(torch.arange(number).mul_(len(split)).div_(number, rounding_mode="floor").numpy())
    return next(iter(part.batches(number, rng=None)))[0]


def gaussian_calibration(shape: Sequence[int], count: int, *, seed: int = 0) -> Tensor:
    """N(0, 1) images (count, *shape): calibration without data (arXiv 2308.10438, section 4.4: "zero-data")."""
    _check_count(count)
    return torch.randn(count, *shape, generator=generator(seed, Purpose.DATA))


def _check_count(count: int) -> None:
    if count < 1:
        raise UserError(f"calibration images = {count}: must be at least 1")


def calibration_images(data: Data | None, shape: Sequence[int], count: int, *, tokens: bool = False) -> Tensor | None:
    """Of a data set's training part, where there is one; Gaussian ones of `shape` otherwise, and no tokens: None."""
    if data is not None:
        return calibration(data.train, count)
    return None if tokens else gaussian_calibration(shape, count)


def pooled(parts: Sequence[Curves], counts: Sequence[int], *, summary: str = "mean") -> dict[str, list[float]]:
    """The curves of all samples from those of parts, measured on a common model with `counts` samples each."""
    pool = SUMMARIES[summary].pool
    return {
        name: [pool(values, counts) for values in zip(*(part[name] for part in parts), strict=True)]
        for name in parts[0]
    }
