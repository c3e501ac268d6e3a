"""Federations made for measuring, on random data of a real data set's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fl_sim.config.experiment import Experiment
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import FlatParams, Task, Update
from fl_sim.data import Data
from fl_sim.models.parameters import load, snapshot
from fl_sim.sparsity import global_topk_mask, magnitude
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training


def cifar_shape() -> Data:
    """50,000 random images of CIFAR-10's shape, and as many labels."""
    return _random(50_000, (3, 32, 32))


def small_shape() -> Data:
    """20,000 random grey 8x8 images."""
    return _random(20_000, (1, 8, 8))


def tiny_shape() -> Data:
    """Random grey 8x8 images of which 12,800 are for training: 50 for each of 256 clients."""
    return _random(12_827, (1, 8, 8))


def digit_shape() -> Data:
    """20,000 random grey 28x28 images, the shape of MNIST."""
    return _random(20_000, (1, 28, 28))


def _random(count: int, shape: tuple[int, int, int]) -> Data:
    rng = numpy_generator(0, Purpose.DATA)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = rng.integers(0, 10, count, dtype=np.int64)
    return Data.of(
        images, labels, test_inputs=images[:100], test_targets=labels[:100], num_classes=10, validation=0.002
    )


def echo(task: Task, ctx: ClientContext) -> Update:
    """A client that does nothing: it returns what it received."""
    return Update(task.params, ctx.num_examples)


def nudge(task: Task, ctx: ClientContext) -> Update:
    """A client that does next to nothing: it adds a number of its own to all that it received."""
    assert isinstance(task.params, FlatParams)
    return Update(task.params.over(task.params.flat + (ctx.seed % 1000) / 1e6), ctx.num_examples)


def largest(task: Task, ctx: ClientContext) -> Update:
    """A client that draws a change, and sends the largest tenth of it with what error feedback adds."""
    assert isinstance(task.params, FlatParams)
    shapes = tuple(value.shape for value in task.params.values())
    moved = task.params.flat + torch.randn(len(task.params.flat), generator=ctx.rng).mul_(1e-3)
    params = FlatParams.view(moved, task.params.names, shapes)
    weights = {name: value for name, value in params.items() if value.dim() > 1}
    change = magnitude({name: value - task.params[name] for name, value in ctx.corrected(weights).items()})
    return Update(params, ctx.num_examples, global_topk_mask(change, 0.1))


def in_order(*, training: Training) -> Client:
    """Clients that train on their samples in the order they have them, without dropout, so that another library can do the same."""

    def train(task: Task, ctx: ClientContext) -> Update:
        model = load(ctx.model, task.params)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        metrics = training.fit(model, ctx.data, ctx.loss)
        return Update(snapshot(model, task.params), ctx.num_examples, metrics=metrics)

    return train


@dataclass(frozen=True)
class Workload:
    """A federation to be timed: which model, how many clients of how many a round, and what each of them does.

    Attributes:
        model, width: as in the config.
        clients, cohort: in the federation; in a round.
        batch: samples a step.
        steps: SGD steps (learning rate 0.1) of a client in a round; None = one epoch.
        data: "cifar_shape", "digit_shape", "small_shape" or "tiny_shape".
        partition: as in the config's `[data]` table.
        client: what the clients do.
    """

    model: str
    clients: int
    cohort: int
    width: float = 1.0
    batch: int = 10
    steps: int | None = None
    data: str = "cifar_shape"
    partition: Mapping[str, object] = field(default_factory=lambda: {"partition": "iid"})
    client: str = "clients.presets:fedavg"

    def on(
        self, engine: str, *, workers: int = 2, precision: str = "float32", overrides: Sequence[str] = ()
    ) -> Experiment:
        """The federation on an engine; `overrides` as on the command line."""
        steps = {} if self.steps is None else {"steps": self.steps}
        source = f"fl_sim.bench.workloads:{self.data}"
        return Experiment.from_tree(
            {
                "name": f"bench-{self.model.rpartition(':')[2]}",
                "engine": engine,
                "device": "cpu",
                "client": self.client,
                "data": {"source": source, "clients": self.clients, "validation": 0.002, **self.partition},
                "model": {"name": self.model, "width": self.width},
                "cohort": {"size": self.cohort},
                "training": {"lr": 0.1, "epochs": 1, **steps, "batch_size": self.batch, "precision": precision},
                "ray": {"workers": workers},
                "workers": {"count": workers},
            },
            overrides,
        )


ECHO, NUDGE = "fl_sim.bench.workloads:echo", "fl_sim.bench.workloads:nudge"
LARGEST, IN_ORDER = "fl_sim.bench.workloads:largest", "fl_sim.bench.workloads:in_order"
B0 = Workload("cnn", clients=1000, cohort=10, steps=5)
"""CIFAR shape, 1,000 clients x 50 samples, 10 a round, one epoch in batches of 10, 1,626,442 parameters."""
B0_SMALL = Workload("cnn", clients=1000, cohort=10, steps=5, width=0.178)
"""The same with 50,624 parameters, where what surrounds the training weighs more."""
TINY_MLP = Workload("mlp", clients=256, cohort=256, steps=5, width=0.5, data="tiny_shape")
"""256 clients x 50 samples, all of them each round, five steps of ten, an MLP 64-32-10 of 2,410 parameters."""
RESNET32 = Workload("resnet32", clients=190, cohort=4, batch=64, steps=4)
"""Four clients of 256 samples in batches of 64, 466,906 parameters."""
SKEWED = Workload(
    "cnn", clients=200, cohort=50, width=0.178, partition={"partition": "dirichlet", "alpha": 0.3, "min_size": 10}
)
"""One epoch of clients whose sizes differ many times over."""


def no_op(engine: str, *, workers: int = 2, data: str = "cifar_shape", cohort: int = 100) -> Experiment:
    """Clients that echo the 466,906 parameters of ResNet-32."""
    return Workload("resnet32", clients=1000, cohort=cohort, data=data, client=ECHO).on(engine, workers=workers)


def many(engine: str, *, workers: int = 2, clients: int = 1000) -> Experiment:
    """1,000 clients a round that echo a model of about a thousand parameters."""
    work = Workload("mlp", clients=clients, cohort=1000, width=0.2, data="small_shape", client=ECHO)
    return work.on(engine, workers=workers)
