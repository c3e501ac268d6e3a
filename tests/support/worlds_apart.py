"""Parts that come out otherwise in each process, and parts that only look as if they did."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fl_sim.data import Data
from fl_sim.data import load as load_data
from fl_sim.data.partition import Request


def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_data("digits")
    splits = (data.train, data.validation, data.test)
    return (
        np.concatenate([split.images.numpy() for split in splits]),
        np.concatenate([split.labels.numpy() for split in splits]),
    )


def _made(images: np.ndarray, labels: np.ndarray) -> Data:
    return Data.of(images[:1500], labels[:1500], test_inputs=images[1500:], test_targets=labels[1500:], num_classes=10)


def unseeded_split() -> Data:
    images, labels = _digits()
    order = np.random.default_rng().permutation(len(images))
    return _made(images[order], labels[order])


def numbered_anyhow() -> Data:
    """Class numbers in an order that differs from process to process, as `enumerate(set(names))` gives them."""
    images, labels = _digits()
    return _made(images, np.random.default_rng().permutation(10)[labels])


def noisy() -> Data:
    images, labels = _digits()
    images[3, 0, 0, 0] = np.random.default_rng().integers(20, 256)
    return _made(images, labels)


def by_global_generators() -> Data:
    """A split by NumPy's global generator, which is seeded while data is loaded."""
    images, labels = _digits()
    order = np.random.permutation(len(images))  # noqa: NPY002
    return _made(images[order], labels[order])


def unseeded_partition(labels: np.ndarray, request: Request) -> list[np.ndarray]:
    order = np.random.default_rng().permutation(len(labels))
    return [np.sort(part) for part in np.array_split(order, request.num_clients)]


def _weights(rng: np.random.Generator | np.random.RandomState) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(rng.normal(0, 0.1, (10, 64))))
    return model


def unseeded_weights(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return _weights(np.random.default_rng())


def weights_by_numpy(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return _weights(np.random.mtrand._rand)
