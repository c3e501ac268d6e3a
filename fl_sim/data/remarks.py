"""Remarks on valid data that may be meant otherwise: one line each, for the log."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fl_sim.data.dataset import Data, Labels
from fl_sim.data.listing import listed
from fl_sim.data.split import Split

SAMPLE = 1000
"""Images that are looked at before all are."""
MOST_COLOURS = 4
"""Channels of a picture; an axis this short at the end may be the channels."""


def remarks(data: Data) -> list[str]:
    """List remarks on the data that a user may want to know before a run."""
    return [line for look in LOOKS for line in look(data)]


def _empty_classes(data: Data) -> list[str]:
    """Classes without samples: a model has an output for each all the same."""
    trained = [_labels(part) for part in (data.train, data.validation, data.proxy) if part is not None]
    lines = []
    for part, labels in (("training", np.concatenate(trained)), ("test", _labels(data.test))):
        without = [str(number) for number in np.flatnonzero(np.bincount(labels, minlength=data.num_classes) == 0)]
        if without:
            lines.append(f"{len(without)} of {data.num_classes} classes have no {part} samples: {listed(without)}")
    return lines


def _labels(split: Split) -> Labels:
    """Without those of unlabelled images, -1."""
    labels: Labels = split.labels.numpy()
    return labels[labels >= 0]


def _dark(data: Data) -> list[str]:
    """Images of 0 and 1, as fractions become when they are rounded."""
    stored = data.train.stored
    if not len(stored) or stored[:SAMPLE].max() > 1 or stored.max() > 1:
        return []
    return ["no training image holds a value above 1; needed: 0 to 255, as black to white"]


def _channels_last(data: Data) -> list[str]:
    channels, height, width = data.shape
    if channels <= MOST_COLOURS or height <= MOST_COLOURS or width > MOST_COLOURS:
        return []
    return [f"images have {channels} channels of {height} x {width} pixels; channels come first: (N, C, H, W)"]


def _shared(data: Data) -> list[str]:
    """Samples that are in two parts: what is measured on them was trained on."""
    parts = {"training": data.train, "validation": data.validation, "test": data.test}
    lines = []
    for (one, first), (other, second) in itertools.combinations(parts.items(), 2):
        if first.stored.data_ptr() == second.stored.data_ptr():
            both = int(torch.isin(_positions(first), _positions(second)).sum())
            lines += [f"{both} images are {one} and {other} samples"] if both else []
    return lines


def _positions(split: Split) -> Tensor:
    return torch.arange(len(split)) if split.positions is None else split.positions


def _normalisation(data: Data) -> list[str]:
    """Parts that are normalised by other numbers than the training set."""
    parts = {"validation": data.validation, "test": data.test}
    other = [
        name
        for name, part in parts.items()
        if not (torch.allclose(part.mean, data.train.mean) and torch.allclose(part.std, data.train.std))
    ]
    return [f"{name} images are normalised by another mean or std than training images" for name in other]


LOOKS: tuple[Callable[[Data], list[str]], ...] = (_empty_classes, _dark, _channels_last, _shared, _normalisation)
