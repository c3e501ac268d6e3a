"""The limit: the SGD steps of a workload's clients in bare PyTorch, float32, default layout, one thread a process."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch.nn import functional

from fl_sim import models
from fl_sim.bench.workloads import Workload
from fl_sim.core.seeding import Purpose, generator
from fl_sim.runtime.grids.allocator import keep_freed_memory


@dataclass(frozen=True)
class Bare:
    """A workload's steps on random images, and nothing else.

    Attributes: `model`, `width`, `batch`, `steps` as in `Workload`; `clients` of a round; `shape` of an image.
    """

    model: str
    width: float
    clients: int
    batch: int
    steps: int
    shape: tuple[int, int, int] = (3, 32, 32)

    @classmethod
    def of(cls, work: Workload) -> Bare:
        """The limit of a workload with a fixed number of steps."""
        assert work.steps is not None
        shape = (3, 32, 32) if work.data == "cifar_shape" else (1, 8, 8)
        return cls(work.model, work.width, work.cohort, work.batch, work.steps, shape)

    def start(self) -> Callable[[int], None]:
        """Build a function that trains a number of clients, one after the other, in this process."""
        torch.set_num_threads(1)
        rng = generator(0, Purpose.DATA)
        images = torch.randn(self.steps * self.batch, *self.shape, generator=rng)
        labels = torch.randint(0, 10, (self.steps * self.batch,), generator=rng)
        channels, side, _ = self.shape
        model = models.build(self.model, width=self.width, in_channels=channels, image_size=side).train()

        def run(clients: int) -> None:
            optimizer = torch.optim.SGD(
                model.parameters(), lr=0.1, fused=True
            )  # of PyTorch's three the fastest on a CPU
            for _ in range(clients):
                for step in range(self.steps):
                    part = slice(step * self.batch, (step + 1) * self.batch)
                    optimizer.zero_grad()
                    functional.cross_entropy(model(images[part]), labels[part]).backward()
                    optimizer.step()

        return run


def _work(bare: Bare, pipe: Connection) -> None:
    keep_freed_memory()
    run = bare.start()
    while (clients := pipe.recv()) is not None:
        run(clients)
        pipe.send(None)


@contextmanager
def spread(bare: Bare, count: int) -> Iterator[Callable[[], None]]:
    """A function that does one round spread over `count` processes of its own, with the allocator set as the engines set it."""
    context = mp.get_context("spawn")
    pipes, workers = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_work, args=(bare, theirs), daemon=True)
        worker.start()
        pipes.append(ours)
        workers.append(worker)

    def one_round() -> None:
        for pipe in pipes:
            pipe.send(bare.clients // count)
        for pipe in pipes:
            pipe.recv()

    try:
        yield one_round
    finally:
        for pipe in pipes:
            pipe.send(None)
        for worker in workers:
            worker.join()
