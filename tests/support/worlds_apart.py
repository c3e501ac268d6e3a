"""Parts that come out otherwise in each process, and parts that only look as if they did."""

from __future__ import annotations

import os

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


SALT = os.getpid()
"""What models of this process are drawn from: the same for each of them, and another one in another process."""


def weights_of_a_process(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return _weights(np.random.default_rng(SALT))


class Projected(nn.Module):
    """A linear layer on a fixed random projection, which is a buffer or a plain attribute."""

    def __init__(self, rng: np.random.Generator | np.random.RandomState, *, buffer: bool) -> None:
        super().__init__()
        projection = torch.from_numpy(rng.normal(0, 0.125, (64, 32)).astype("f4"))
        if buffer:
            self.register_buffer("projection", projection)
        else:
            self.projection = projection
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((images.flatten(1) @ self.projection).relu())


def buffer_of_a_process(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return Projected(np.random.default_rng(SALT), buffer=True)


def attribute_of_a_process(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return Projected(np.random.default_rng(SALT), buffer=False)


def unseeded_weights(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return _weights(np.random.default_rng())


def unseeded_buffer(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return Projected(np.random.default_rng(), buffer=True)


def unseeded_attribute(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return Projected(np.random.default_rng(), buffer=False)


def unseeded_generator(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    model = _weights(np.random.default_rng(0))
    model.noise = np.random.default_rng()  # type: ignore[assignment]
    return model


def buffer_by_numpy(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return Projected(np.random.mtrand._rand, buffer=True)


def attribute_by_numpy(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return Projected(np.random.mtrand._rand, buffer=False)


def weights_by_numpy(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return _weights(np.random.mtrand._rand)


class Half(nn.Linear):
    """A frozen layer of half precision between float32 ones."""

    def __init__(self) -> None:
        super().__init__(64, 32, dtype=torch.bfloat16)
        self.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.to(torch.bfloat16)).float().relu()


def half_frozen(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Half(), nn.Linear(32, 10))
