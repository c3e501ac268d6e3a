"""Data set, split once: training, validation, test, and the server's proxy samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fl_sim.core.errors import in_one_line
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import UserError
from fl_sim.data.images import Images
from fl_sim.data.split import Split

Labels = NDArray[np.int64]
MOST_CLASSES = 1 << 16
"""A label above is a damaged file, not a class: models have an output for each."""
NEEDED = "uint8 (N, channels, height, width)"


@dataclass(frozen=True)
class Data:
    """Data set, split once. The validation set may choose hyper-parameters; the test set only measures.

    Attributes:
        proxy: a part of the training set held by the server, disjoint from all others; None unless asked for.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    proxy: Split | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.shape
        return channels, height, width

    @classmethod
    def of(
        cls,
        images: Images | ArrayLike,
        labels: Labels | ArrayLike,
        *,
        test_images: Images | ArrayLike,
        test_labels: Labels | ArrayLike,
        num_classes: int,
        validation: float = 0.1,
        proxy: float = 0.0,
    ) -> Data:
        """Split training images (N, C, H, W) into train, validation and proxy, stratified by label; seed 0 always.

        Arrays, tensors on the CPU and nested lists are taken.

        Raises:
            UserError: images that are not uint8 (N, C, H, W) of one shape in both parts, labels that are not one class for
                each, or shares that leave nothing to train on.
        """
        if not (validation >= 0 and proxy >= 0 and validation + proxy < 1):
            raise UserError(f"data: validation = {validation}, proxy = {proxy}; needed: shares of 1 that leave some")
        check_classes("data", num_classes)
        images, test_images = _images(images, ""), _images(test_images, "test_")
        if images.shape[1:] != test_images.shape[1:]:
            raise UserError(
                f"data: images of {images.shape[1:]} and test_images of {test_images.shape[1:]}; needed: one shape"
            )
        labels = _labels(labels, len(images), num_classes, "")
        test_labels = _labels(test_labels, len(test_images), num_classes, "test_")
        rng = numpy_generator(0, Purpose.DATA)
        held, server, rest = [], [], []
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            first, second = round(validation * len(members)), round((validation + proxy) * len(members))
            held.append(members[:first])
            server.append(members[first:second])
            rest.append(members[second:])
        chosen = [np.sort(np.concatenate(part)) for part in (rest, held, server)]
        # Decoded images are memory-mapped copy-on-write: the one copy is the training part, resident anyway.
        train = torch.from_numpy(images[chosen[0]])
        level = (
            train.float().div_(255) if len(train) <= 5000 else train[:: max(1, len(train) // 5000)].float().div_(255)
        )
        mean, std = level.mean(dim=(0, 2, 3)), level.std(dim=(0, 2, 3)).clamp_(min=1e-3)

        def split(some: Images, of_them: Labels) -> Split:
            return Split(torch.from_numpy(some), torch.from_numpy(of_them), mean, std)

        parts = [split(images[part], labels[part]) for part in chosen[1:]]
        return cls(
            split(train.numpy(), labels[chosen[0]]),
            parts[0],
            split(test_images, test_labels),
            int(num_classes),
            parts[1] if proxy > 0 else None,
        )


def check_classes(where: str, num_classes: object) -> None:
    """Complain of a number of classes that is none. Raises UserError."""
    whole = isinstance(num_classes, (int, np.integer)) and not isinstance(num_classes, bool)
    if not (whole and 1 <= cast(int, num_classes) <= MOST_CLASSES):
        raise UserError(f"{where}: num_classes = {num_classes!r}; needed: a whole number from 1 to {MOST_CLASSES}")


def levels(low: float, high: float) -> str:
    """The end of a message on images of fractions: what they hold, and what is needed instead."""
    return f", 0 to 255; these go from {low:g} to {high:g}, and every value is divided by 255 before training"


def _array(value: object, name: str) -> NDArray[np.generic]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors of a GPU or with gradients
        raise UserError(f"data: {name} are no array: {in_one_line(error)}") from error


def _images(value: object, name: str) -> Images:
    images = _array(value, f"{name}images")
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        fractions = np.issubdtype(images.dtype, np.floating) and images.size
        hint = levels(images.min(), images.max()) if fractions else ""
        raise UserError(f"data: {name}images are {images.dtype} {images.shape}; needed: {NEEDED}{hint}")
    return np.require(images, np.uint8, ["C", "W"])  # PyTorch takes no mirrored views, and warns of read-only ones


def _labels(value: object, samples: int, num_classes: int, name: str) -> Labels:
    labels = _array(value, f"{name}labels")
    if labels.shape != (samples,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"data: {name}labels are {labels.dtype} {labels.shape}; needed: an integer for each of {samples}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        found = f"found {labels.min()} to {labels.max()}"
        raise UserError(f"data: {name}labels must be there, from 0 to {num_classes - 1}; {found}")
    return labels.astype(np.int64)
