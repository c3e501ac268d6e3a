"""Cohort benchmark: client updates per second of the cohort engine beside bare PyTorch, client by client."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fl_sim import models
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import UserError
from fl_sim.data import Split
from fl_sim.models.parameters import entries
from fl_sim.training.batched import Member, fit
from fl_sim.training.loop import Training

STEPS, REPEATS, CLASSES = 5, 5, 10


@dataclass(frozen=True)
class Grid:
    """Workloads to measure: every model with every cohort and batch size."""

    models: Sequence[str]
    cohorts: Sequence[int]
    batch_sizes: Sequence[int]


@dataclass(frozen=True)
class Row:
    """Client updates (of five steps each) per second, medians of five; peak memory of the cohort in MB (10^6 bytes)."""

    model: str
    batch: int
    cohort: int
    one_by_one: float
    together: float
    ratio: float
    peak_mb: float


def measure(device: str, grid: Grid) -> list[Row]:
    """Measure the grid on a device, on random images of CIFAR's shape. Dropout is off: its draws cannot be batched.

    Raises:
        UserError: there is no such device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here, so there is nothing to measure; --device cpu only shows that the engine runs")
    cells = [(name, batch, count) for name in grid.models for batch in grid.batch_sizes for count in grid.cohorts]
    return [_row(torch.device(device), name, batch, count) for name, batch, count in cells]


def _row(device: torch.device, name: str, batch: int, count: int) -> Row:
    model = models.build(name, num_classes=CLASSES, in_channels=3, image_size=32).to(device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parts = [_split(device, STEPS * batch, client) for client in range(count)]
    training = Training(lr=0.01, batch_size=batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = {n: value.detach().clone() for n, value in entries(model).items()}
    together = _seconds(device, lambda: _together(model, start, parts, training))
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else float("nan")
    alone = _seconds(device, lambda: _one_by_one(model, start, parts, batch))
    return Row(name, batch, count, count / alone, count / together, alone / together, peak)


def _split(device: torch.device, samples: int, client: int) -> Split:
    rng = generator(client, Purpose.DATA)
    images = torch.randint(0, 256, (samples, 3, 32, 32), generator=rng, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (samples,), generator=rng)
    return Split(images, labels, torch.full((3,), 0.5), torch.full((3,), 0.25)).to(device)


def _together(model: nn.Module, start: dict[str, torch.Tensor], parts: list[Split], training: Training) -> None:
    members = [Member(part, None, generator(client, Purpose.CLIENT)) for client, part in enumerate(parts)]
    fit(model, [start] * len(parts), members, training)


def _one_by_one(model: nn.Module, start: dict[str, torch.Tensor], parts: list[Split], batch: int) -> None:
    """Bare SGD steps of the same clients, without the framework."""
    model.train()
    for client, part in enumerate(parts):
        model.load_state_dict(start, strict=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for images, labels in part.batches(batch, rng=generator(client, Purpose.CLIENT)):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    """Median seconds after one warm-up; the device's work included."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
