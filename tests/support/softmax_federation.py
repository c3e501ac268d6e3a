"""A softmax regression on 4 clients of different sizes, whose whole-batch steps a few lines of NumPy can take too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fl_sim import Experiment
from fl_sim.data import Data

Array = NDArray[np.float64]
SIZES, FEATURES, CLASSES, LR = (12, 20, 8, 24), 3, 3, 0.3
CONFIG: Mapping[str, object] = {
    "rounds": 4,
    "data": {
        "source": "softmax_federation:table",
        "partition": "softmax_federation:in_order",
        "clients": len(SIZES),
        "validation": 0.0,
    },
    "model": {"name": "softmax_federation:regression"},
    "cohort": {"size": 3},
    "training": {"lr": LR, "epochs": 2, "batch_size": 1000},
    "evaluate": {"every": 4},
}


def samples() -> tuple[Array, NDArray[np.int64]]:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(sum(SIZES), FEATURES))
    y = np.argmax(x + np.repeat(np.eye(CLASSES)[[0, 1, 2, 0]], SIZES, axis=0) + rng.normal(size=x.shape), axis=1)
    return x.astype(np.float32).astype(np.float64), y


def table(validation: float) -> Data:
    x, y = samples()
    return Data.of(
        x.astype(np.float32),
        y,
        test_inputs=x.astype(np.float32),
        test_targets=y,
        num_classes=CLASSES,
        validation=validation,
    )


def one_sample_each(validation: float) -> Data:
    """As `table`, each client's samples being copies of its first: the order of the batches plays no part."""
    x, y = samples()
    first = np.repeat(np.cumsum((0, *SIZES[:-1])), SIZES)
    return Data.of(
        x[first].astype(np.float32),
        y[first],
        test_inputs=x.astype(np.float32),
        test_targets=y,
        num_classes=CLASSES,
        validation=validation,
    )


def in_order(labels: NDArray[np.int64], request: object) -> list[NDArray[np.int64]]:
    return list(np.split(np.arange(len(labels)), np.cumsum(SIZES)[:-1]))


def regression(*, num_classes: int, **shape: object) -> torch.nn.Module:
    return torch.nn.Linear(FEATURES, num_classes)


def gradient(w: Array, client: int, first: int | None = None) -> Array:
    """Of the mean cross-entropy of softmax(x W^T + b) over a client's (first) samples; w = [W, b], (classes, features + 1)."""
    z, y = (part[:first] for part in with_ones(client))
    return (softmax(z @ w.T) - np.eye(CLASSES)[y]).T @ z / len(y)


def loss(w: Array, client: int) -> float:
    z, y = with_ones(client)
    return float(-np.log(softmax(z @ w.T)[np.arange(len(y)), y]).mean())


def with_ones(client: int) -> tuple[Array, NDArray[np.int64]]:
    x, y = samples()
    part = slice(sum(SIZES[:client]), sum(SIZES[: client + 1]))
    return np.hstack([x[part], np.ones((SIZES[client], 1))]), y[part]


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def local(
    w: Array,
    client: int,
    correction: Callable[[Array], Array] = lambda y: np.zeros_like(y),
    *,
    steps: int = 2,
    lr: float = LR,
) -> Array:
    """A client's parameters after whole-batch steps of gradient descent, each gradient plus a correction."""
    y = w
    for _ in range(steps):
        y = y - lr * (gradient(y, client) + correction(y))
    return y


def weighted(w: Array, cohort: list[int]) -> Array:
    sizes = [SIZES[k] for k in cohort]
    return np.average([local(w, k) for k in cohort], axis=0, weights=sizes)


def experiment(out: Path, *overrides: str) -> Experiment:
    """Four rounds of three clients, two whole-batch steps each."""
    return Experiment.from_tree(CONFIG, [f'out="{out}"', *overrides])


def joined(params: Mapping[str, torch.Tensor]) -> Array:
    weight, bias = (params[name].double().numpy() for name in ("weight", "bias"))
    return np.hstack([weight, bias[:, None]])
