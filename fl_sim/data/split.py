"""A set of samples and its batches: images are uint8 in memory, normalised and augmented per batch, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_sim.core.types import UserError
from fl_sim.data.kinds import Inputs, described
from fl_sim.data.weights import PER_SAMPLE, WeightedBatch, parts_of

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(images uint8 (B, C, H, W), CPU generator) -> images of the same shape and dtype."""


AHEAD_BYTES = 1 << 20
"""Small batches without augmentation are made several at a time, so many bytes as float32: it is calls that they cost."""


@dataclass(frozen=True)
class CropFlip:
    """Random crop after zero padding, and horizontal flip: the usual CIFAR augmentation (He et al., 2016).

    Offsets and flips are drawn on the CPU, so that every device sees the same batch.
    """

    padding: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        reach = 2 * self.padding + 1
        top, left = torch.randint(reach, (2, count), generator=rng)
        mirrored = torch.rand(count, generator=rng) < 0.5 if self.flip else torch.zeros(count, dtype=torch.bool)
        columns = torch.arange(width).expand(count, width)
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + left[:, None]
        rows = torch.arange(height) + top[:, None]
        padded = functional.pad(images, (self.padding,) * 4)
        # One gather over flat pixels: indexing with a tensor for each axis takes four times as long.
        pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(count, 1, -1).to(images.device)
        return padded.flatten(2).gather(2, pixels.expand(-1, images.shape[1], -1)).view(images.shape)


def _as_stored(inputs: Tensor) -> Tensor:
    return inputs


@dataclass(frozen=True, eq=False)
class Split:
    """Samples: inputs and their targets.

    Attributes:
        stored: inputs, possibly memory-mapped, shared by all subsets: images uint8 (M, C, H, W), tables and signals float32
            (M, ...), tokens int64 (M, ...); see `fl_sim.data.kinds`.
        labels: targets: classes int64 (N,), next tokens int64 (N, T), labels bool (N, K), or numbers float32.
        mean, std: float32 (C,), one for each channel of images, in units of the 0..1 range, or for each feature of
            numbers, in their own unit; None = a model gets the inputs as they are stored.
        augment: applied to shuffled batches only.
        positions: int64 (N,), where in `stored` the samples are; None = all of them, N = M.
        groups: int64 (N,), number of the group of each sample, such as its writer; None = there are none.
        weights: float32 (N,), how much each sample counts in the loss, with mean 1 over all training samples; None = each 1.
        by_weight: whether `examples` is the sum of the weights.
    """

    stored: Tensor
    labels: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    augment: Augment | None = None
    positions: Tensor | None = None
    groups: Tensor | None = None
    weights: Tensor | None = None
    by_weight: bool = False

    def __len__(self) -> int:
        return self.labels.shape[0]  # `len` of a tensor takes several times as long

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        """Get one sample: the input as a model gets it, not augmented, and its target. A map-style `Dataset`.

        A class is an int, every other target a tensor.

        `batches` is the fast way; `DataLoader(ctx.data)` and `for image, label in ctx.data` go through here.

        Raises:
            IndexError: no such sample.
        """
        label = self.labels[index]
        at = index if self.positions is None else int(self.positions[index])
        one = self._normaliser()(self.stored[at : at + 1].clone())[0]
        return one, int(label) if self.labels.dim() == 1 else label

    def __iter__(self) -> Iterator[tuple[Tensor, int | Tensor]]:
        return map(self.__getitem__, range(len(self)))

    @property
    def images(self) -> Tensor:
        """Inputs as they are stored, (N, ...); for a subset, a copy made now."""
        return self.stored if self.positions is None else self.stored[self.positions]

    @property
    def examples(self) -> int:
        """What the samples count in a mean over clients: their number, or `PER_SAMPLE` times the sum of their weights."""
        if self.weights is None or not self.by_weight:
            return len(self)
        return max(1, round(PER_SAMPLE * float(self.weights.double().sum())))

    @property
    def shape(self) -> torch.Size:
        """Shape of one input: (C, H, W) of an image, (features,) of a row, (T,) of a sequence of tokens."""
        return self.stored.shape[1:]

    @property
    def device(self) -> torch.device:
        """Device of inputs and targets."""
        return self.stored.device

    def example(self, count: int = 1, device: torch.device | None = None) -> Tensor:
        """Zeros of the shape and dtype that a model gets, (count, ...)."""
        dtype = torch.int64 if self.stored.dtype == torch.int64 else torch.float32
        return torch.zeros(count, *self.shape, dtype=dtype, device=device or self.device)

    def subset(self, indices: NDArray[np.int64]) -> Split:
        """The samples at these positions. No input is copied: a federation's clients share one array."""
        chosen = torch.from_numpy(np.ascontiguousarray(indices)).to(self.device)
        positions = chosen if self.positions is None else self.positions.index_select(0, chosen)
        each = {name: getattr(self, name) for name in ("labels", "groups", "weights")}
        kept = {name: value.index_select(0, chosen) for name, value in each.items() if value is not None}
        return replace(self, positions=positions, **kept)

    def noise(self, count: int, rng: torch.Generator) -> Split:
        """Unlabelled (-1) images of normal noise with this split's mean, deviation and shape.

        Raises:
            UserError: the inputs are no images.
        """
        if self.mean is None or self.std is None or self.stored.dtype != torch.uint8:
            raise UserError(
                f"data.noise: the inputs are {described(self.stored)}; allowed: images ({Inputs.IMAGES.value})"
            )
        drawn = torch.randn(count, *self.shape, generator=rng)
        level = drawn * self.std.cpu().view(-1, 1, 1) + self.mean.cpu().view(-1, 1, 1)
        images = (255 * level).round_().clamp_(0, 255).to(torch.uint8)
        return replace(
            self,
            stored=images,
            labels=torch.full((count,), -1),
            augment=None,
            positions=None,
            groups=None,
            weights=None,
        )

    def augmented(self, augment: Augment | None) -> Split:
        """Set the augmentation of training batches."""
        return replace(self, augment=augment)

    def to(self, device: torch.device) -> Split:
        """Copy the samples to a device; returns the same object where they are there already."""
        if self.device == device:
            return self
        held = {name: getattr(self, name) for name in ("labels", "mean", "std", "groups", "weights")}
        moved = {name: value.to(device) for name, value in held.items() if value is not None}
        return replace(self, stored=self.images.to(device), positions=None, **moved)

    def _normaliser(self) -> Callable[[Tensor], Tensor]:
        """What makes stored inputs (B, ...) what a model gets, in memory of their own or in place: mean 0, deviation 1."""
        if self.mean is None or self.std is None:
            return _as_stored
        largest = 255 if self.stored.dtype == torch.uint8 else 1
        each = (1, -1, *(1,) * (self.stored.dim() - 2))
        scale, shift = (1 / (largest * self.std)).view(each), (self.mean / self.std).view(each)
        return lambda inputs: inputs.float().mul_(scale).sub_(shift)

    def inputs_at(self, where: Tensor) -> Tensor:
        """Inputs at positions of `stored`, int64 (B,), as a model gets them, contiguous and not augmented."""
        # Indexing as `stored[where]` does takes six times as long.
        return self._normaliser()(self.stored.index_select(0, where)).contiguous()

    def batches(
        self,
        batch_size: int,
        *,
        rng: torch.Generator | None = None,
        layout: torch.memory_format = torch.contiguous_format,
        samples: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised batches: (inputs (B, ...), targets (B, ...)); the last may be smaller.

        Inputs of four dimensions come in this memory layout, all others are contiguous. With `rng` (CPU) the samples are
        shuffled and augmented; without, they come in order as they are. `samples` takes only so many of them, the first.
        Where samples have weights, batches are `WeightedBatch`.
        """
        count = len(self) if samples is None else samples
        layout = layout if self.stored.dim() == 4 else torch.contiguous_format
        normalised = self._normaliser()
        order = None if rng is None else torch.randperm(len(self), generator=rng).to(self.device)
        augment = None if rng is None else self.augment
        piece = batch_size * (1 if augment else max(1, AHEAD_BYTES // (4 * batch_size * self.shape.numel())))
        for start in range(0, count, piece):
            part = slice(start, min(start + piece, count))
            chosen = torch.arange(*part.indices(count), device=self.device) if order is None else order[part]
            where = chosen if self.positions is None else self.positions.index_select(0, chosen)
            images = self.stored.index_select(0, where)  # indexing as `stored[where]` does takes six times as long
            if augment is not None and rng is not None:
                images = augment(images, rng)
            ready = normalised(images).contiguous(memory_format=layout)
            targets = self.labels.index_select(0, chosen)
            if self.weights is not None:
                yield from parts_of(WeightedBatch(ready, targets, self.weights.index_select(0, chosen)), batch_size)
            else:
                yield from zip(ready.split(batch_size), targets.split(batch_size), strict=True)
