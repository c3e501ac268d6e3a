"""Remarks on valid data that may be meant otherwise: one line each, for the log."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fl_sim.data.dataset import Data, Labels
from fl_sim.data.kinds import Inputs, Targets, input_kind
from fl_sim.data.listing import listed
from fl_sim.data.split import Split

SAMPLE = 1000
"""Images that are looked at before all are."""
LARGE = 100.0
"""A normalised number is hardly ever as large."""
MOST_COLOURS = 4
"""Channels of a picture; an axis this short at the end may be the channels."""


def remarks(data: Data) -> list[str]:
    """List remarks on the data that a user may want to know before a run."""
    kind = input_kind(data.train.stored)
    return [line for look, of in LOOKS.items() if of is None or of is kind for line in look(data)]


def _empty_classes(data: Data) -> list[str]:
    """Classes without samples: a model has an output for each all the same."""
    if data.targets is not Targets.CLASSES:
        return []
    trained = [_labels(part) for part in (data.train, data.validation, data.proxy) if part is not None]
    lines = []
    for part, labels in (("training", np.concatenate(trained)), ("test", _labels(data.test))):
        without = [str(number) for number in np.flatnonzero(np.bincount(labels, minlength=data.num_classes) == 0)]
        if without:
            lines.append(f"{len(without)} of {data.num_classes} classes have no {part} samples: {listed(without)}")
    return lines


def _one_target(data: Data) -> list[str]:
    """Targets that are all the same: whatever a model learns, it answers right."""
    targets = data.train.labels.reshape(len(data.train), -1)
    if data.targets is Targets.TOKENS or len(targets) < 2:
        return []
    same = (targets == targets[0]).all(dim=0)
    which = (
        "all training targets are"
        if same.all()
        else f"training targets of output {listed([str(int(k)) for k in same.nonzero()])} are"
    )
    return [f"{which} the same: there is nothing to learn from them"] if same.any() else []


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
    channels, height, width = data.train.shape
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
            lines += [f"{both} {_called(data)} are {one} and {other} samples"] if both else []
    return lines


def _positions(split: Split) -> Tensor:
    return torch.arange(len(split)) if split.positions is None else split.positions


def _normalisation(data: Data) -> list[str]:
    """Parts that are normalised by other numbers than the training set."""
    parts = {"validation": data.validation, "test": data.test}
    other = [
        name
        for name, part in parts.items()
        if not (_close(part.mean, data.train.mean) and _close(part.std, data.train.std))
    ]
    called = _called(data)
    return [f"{name} {called} are normalised by another mean or std than training {called}" for name in other]


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.allclose(one, other)


def _called(data: Data) -> str:
    return "images" if input_kind(data.train.stored) is Inputs.IMAGES else "inputs"


def _wide(data: Data) -> list[str]:
    """Numbers far from mean 0 and deviation 1 that nothing normalises: usual learning rates diverge on them."""
    stored = data.train.stored[:SAMPLE]
    if data.train.mean is not None or not len(stored) or stored.abs().max() <= LARGE:
        return []
    low, high = float(stored.min()), float(stored.max())
    return [f"inputs go from {low:g} to {high:g} and are not normalised; Data.of(..., standardise=True) does that"]


def _far(data: Data) -> list[str]:
    """Numbers to predict that are far from 0: squared errors as large make usual learning rates diverge."""
    targets = data.train.labels
    if data.targets is not Targets.NUMBERS or not len(targets) or targets.abs().max() <= LARGE:
        return []
    span = f"targets go from {float(targets.min()):g} to {float(targets.max()):g}"
    return [f"{span}; usual learning rates need numbers about 0 with a deviation of 1: subtract the mean and divide"]


LOOKS: Mapping[Callable[[Data], list[str]], Inputs | None] = {
    _empty_classes: None,
    _one_target: None,
    _dark: Inputs.IMAGES,
    _channels_last: Inputs.IMAGES,
    _wide: Inputs.NUMBERS,
    _far: None,
    _shared: None,
    _normalisation: None,
}
"""A look at the data -> the kind of inputs that it is for; None = any."""
