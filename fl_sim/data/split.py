"""A set of labelled images and its batches: uint8 in memory, normalised and augmented per batch, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

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


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images.

    Attributes:
        stored: uint8 (M, C, H, W), possibly memory-mapped, shared by all subsets.
        labels: int64 (N,).
        mean, std: per channel, float32 (C,), in units of the 0..1 range.
        augment: applied to shuffled batches only.
        positions: int64 (N,), where in `stored` the samples are; None = all of them, N = M.
    """

    stored: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    augment: Augment | None = None
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Get one sample: the image, normalised float32 (C, H, W), not augmented, and its label. A map-style `Dataset`.

        `batches` is the fast way; `DataLoader(ctx.data)` and `for image, label in ctx.data` go through here.

        Raises:
            IndexError: no such sample.
        """
        label = int(self.labels[index])
        at = index if self.positions is None else int(self.positions[index])
        scale, shift = (1 / (255 * self.std)).view(-1, 1, 1), (self.mean / self.std).view(-1, 1, 1)
        return self.stored[at].float().mul_(scale).sub_(shift), label

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(self.__getitem__, range(len(self)))

    @property
    def images(self) -> Tensor:
        """uint8 (N, C, H, W); for a subset, a copy made now."""
        return self.stored if self.positions is None else self.stored[self.positions]

    @property
    def shape(self) -> torch.Size:
        """(C, H, W) of an image."""
        return self.stored.shape[1:]

    @property
    def device(self) -> torch.device:
        """Device of images and labels."""
        return self.stored.device

    def subset(self, indices: NDArray[np.int64]) -> Split:
        """The samples at these positions. No image is copied: a federation's clients share one array."""
        chosen = torch.from_numpy(np.ascontiguousarray(indices)).to(self.device)
        positions = chosen if self.positions is None else self.positions.index_select(0, chosen)
        return replace(self, labels=self.labels.index_select(0, chosen), positions=positions)

    def noise(self, count: int, rng: torch.Generator) -> Split:
        """Unlabelled (-1) images of normal noise with this split's mean, deviation and shape."""
        drawn = torch.randn(count, *self.shape, generator=rng)
        level = drawn * self.std.cpu().view(-1, 1, 1) + self.mean.cpu().view(-1, 1, 1)
        images = (255 * level).round_().clamp_(0, 255).to(torch.uint8)
        return replace(self, stored=images, labels=torch.full((count,), -1), augment=None, positions=None)

    def augmented(self, augment: Augment | None) -> Split:
        """Set the augmentation of training batches."""
        return replace(self, augment=augment)

    def to(self, device: torch.device) -> Split:
        """Move the samples to a device; free when they are there."""
        if self.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("labels", "mean", "std")}
        return replace(self, stored=self.images.to(device), positions=None, **moved)

    def batches(
        self,
        batch_size: int,
        *,
        rng: torch.Generator | None = None,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised batches: images float32 (B, C, H, W) in this memory layout, labels int64 (B,); the last may be smaller.

        With `rng` (CPU) the samples are shuffled and augmented; without, they come in order as they are.
        """
        scale = (1 / (255 * self.std)).view(1, -1, 1, 1)
        shift = (self.mean / self.std).view(1, -1, 1, 1)
        order = None if rng is None else torch.randperm(len(self), generator=rng).to(self.device)
        augment = None if rng is None else self.augment
        piece = batch_size * (1 if augment else max(1, AHEAD_BYTES // (4 * batch_size * self.shape.numel())))
        for start in range(0, len(self), piece):
            part = slice(start, start + piece)
            chosen = torch.arange(*part.indices(len(self)), device=self.device) if order is None else order[part]
            where = chosen if self.positions is None else self.positions.index_select(0, chosen)
            images = self.stored.index_select(0, where)  # indexing as `stored[where]` does takes six times as long
            if augment is not None and rng is not None:
                images = augment(images, rng)
            ready = images.float().mul_(scale).sub_(shift).contiguous(memory_format=layout)
            yield from zip(ready.split(batch_size), self.labels.index_select(0, chosen).split(batch_size), strict=True)
