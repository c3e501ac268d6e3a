"""Federations made for measuring, on random data of a real data set's shape."""

from __future__ import annotations

import numpy as np

from fl_sim.config import Experiment
from fl_sim.data import Data
from fl_sim.seeding import Purpose, numpy_generator
from fl_sim.types import ClientContext, Task, Update


def cifar_shape() -> Data:
    """50,000 random images of CIFAR-10's shape, and as many labels."""
    return _random(50_000, (3, 32, 32))


def small_shape() -> Data:
    """20,000 random grey 8x8 images."""
    return _random(20_000, (1, 8, 8))


def _random(count: int, shape: tuple[int, int, int]) -> Data:
    rng = numpy_generator(0, Purpose.DATA)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = rng.integers(0, 10, count, dtype=np.int64)
    return Data.of(images, labels, test_images=images[:100], test_labels=labels[:100], num_classes=10, validation=0.002)


def echo(task: Task, ctx: ClientContext) -> Update:
    """A client that does nothing: it returns what it received."""
    return Update(task.params, ctx.num_examples)


def b0(engine: str, *, workers: int = 2, precision: str = "float32") -> Experiment:
    """B0: CIFAR shape, 1,000 clients x 50 samples, 10 a round, one epoch, batch 10, SGD 0.1, `cnn`."""
    return _experiment(engine, workers, "cifar_shape", "cnn", clients=1000, cohort=10, precision=precision)


def no_op(engine: str, *, workers: int = 2, data: str = "cifar_shape", cohort: int = 100) -> Experiment:
    """Clients that echo the 466,906 parameters of ResNet-32."""
    tree = {"client": "fl_sim.bench.workloads:echo"}
    return _experiment(engine, workers, data, "resnet32", clients=1000, cohort=cohort, **tree)


def many(engine: str, *, workers: int = 2) -> Experiment:
    """1,000 clients a round that echo a model of about a thousand parameters."""
    tree = {"client": "fl_sim.bench.workloads:echo"}
    return _experiment(engine, workers, "small_shape", "mlp", clients=1000, cohort=1000, **tree)


def _experiment(
    engine: str,
    workers: int,
    data: str,
    model: str,
    *,
    clients: int,
    cohort: int,
    precision: str = "float32",
    **tree: object,
) -> Experiment:
    return Experiment.from_tree(
        {
            "name": f"bench-{model}",
            "engine": engine,
            "device": "cpu",
            "data": {
                "source": f"fl_sim.bench.workloads:{data}",
                "clients": clients,
                "partition": "iid",
                "validation": 0.002,
            },
            "model": {"name": model, **({"width": 0.2} if model == "mlp" else {})},
            "cohort": {"size": cohort},
            "training": {"lr": 0.1, "epochs": 1, "batch_size": 10, "precision": precision},
            "ray": {"workers": workers},
            "workers": {"count": workers},
            **tree,
        }
    )
