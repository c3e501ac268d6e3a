"""How close the engines come to the limit: the same SGD steps in bare PyTorch, one thread a process.

Everything is alternated in one run, so that a noisy machine disturbs both sides alike; ratios are medians of paired
repetitions with their quartiles.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn
from torch.nn import functional

from fl_sim import models
from fl_sim.bench import processes, workloads
from fl_sim.config import Experiment
from fl_sim.federation import Federation
from fl_sim.ledger import Ledger
from fl_sim.method import build_strategy
from fl_sim.precision import PRECISIONS, training_seconds
from fl_sim.seeding import Purpose, generator
from fl_sim.simulation import open_grid

CLIENTS, STEPS, BATCH = 10, 5, 10


def bare_round(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, clients: int) -> None:
    """The SGD steps of `clients` clients of B0, and nothing else."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(clients):
        for step in range(STEPS):
            part = slice(step * BATCH, (step + 1) * BATCH)
            optimizer.zero_grad()
            functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()


def _bare_setup() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.set_num_threads(1)
    rng = generator(0, Purpose.DATA)
    images = torch.randn(STEPS * BATCH, 3, 32, 32, generator=rng)
    labels = torch.randint(0, 10, (STEPS * BATCH,), generator=rng)
    return models.build("cnn").train(), images, labels


def _bare_worker(pipe: Connection) -> None:
    model, images, labels = _bare_setup()
    while (clients := pipe.recv()) is not None:
        bare_round(model, images, labels, clients)
        pipe.send(None)


@contextmanager
def bare_processes(count: int) -> Iterator[Callable[[], None]]:
    """A function that runs one B0 round spread over `count` resident processes."""
    context = mp.get_context("spawn")
    pipes, workers = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_bare_worker, args=(theirs,), daemon=True)
        worker.start()
        pipes.append(ours)
        workers.append(worker)

    def one_round() -> None:
        for pipe in pipes:
            pipe.send(CLIENTS // count)
        for pipe in pipes:
            pipe.recv()

    try:
        yield one_round
    finally:
        for pipe in pipes:
            pipe.send(None)
        for worker in workers:
            worker.join()


@contextmanager
def federation_rounds(experiment: Experiment) -> Iterator[Callable[[], None]]:
    """A function that runs one whole round of an experiment: encode, send, train, encode, decode, book, aggregate."""
    federation = Federation.build(experiment)
    with open_grid(experiment, federation) as grid:
        strategy, numbers = build_strategy(federation, Ledger()), itertools.count(1)

        def one_round() -> None:
            number = next(numbers)
            messages = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
            strategy.aggregate_train(number, grid.send_and_receive(messages))

        yield one_round


@dataclass(frozen=True)
class Measured:
    """Seconds of one round of one contestant, over the repetitions."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def alternate(contestants: dict[str, Callable[[], None]], *, repeats: int, warmup: int = 2) -> dict[str, Measured]:
    """Time every contestant once per repetition, in turn."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(warmup + repeats):
        for name, one_round in contestants.items():
            start = time.perf_counter()
            one_round()
            if repeat >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: Measured(name, tuple(seconds)) for name, seconds in times.items()}


def ratio(limit: Measured, measured: Measured) -> tuple[float, float, float]:
    """(median, first quartile, third quartile) of limit/measured over paired repetitions; 1 = as fast as the limit."""
    paired = sorted(a / b for a, b in zip(limit.seconds, measured.seconds, strict=True))
    low, middle, high = statistics.quantiles(paired, n=4)
    return middle, low, high


def measure_b0(precision: str, *, repeats: int = 15) -> dict[str, Measured]:
    """B0: bare PyTorch (float32, default layout) in one and in two processes, inline, workers and Ray with two each."""
    torch.set_num_threads(1)
    model, images, labels = _bare_setup()
    with ExitStack() as stack:
        contestants = {
            "limit1": lambda: bare_round(model, images, labels, CLIENTS),
            "inline": stack.enter_context(federation_rounds(workloads.b0("inline", precision=precision))),
            "limit2": stack.enter_context(bare_processes(2)),
            "workers": stack.enter_context(federation_rounds(workloads.b0("workers", precision=precision))),
            "ray": stack.enter_context(federation_rounds(workloads.b0("ray", precision=precision))),
        }
        return alternate(contestants, repeats=repeats)


def measure_overhead(*, repeats: int = 7) -> dict[str, Measured]:
    """Rounds of clients that do nothing: what the framework itself costs."""
    with ExitStack() as stack:
        contestants = {
            "no-op 467k, inline": stack.enter_context(federation_rounds(workloads.no_op("inline"))),
            "no-op 467k, workers": stack.enter_context(federation_rounds(workloads.no_op("workers"))),
            "no-op 467k, ray": stack.enter_context(federation_rounds(workloads.no_op("ray"))),
            "1k model x 1000, inline": stack.enter_context(federation_rounds(workloads.many("inline"))),
            "1k model x 1000, workers": stack.enter_context(federation_rounds(workloads.many("workers"))),
        }
        return alternate(contestants, repeats=repeats)


def image_rates(*, repeats: int = 3) -> dict[str, float]:
    """ResNet-32, batch 64, one thread: training images a second in each precision; the best of alternated repeats."""
    torch.set_num_threads(1)
    images = torch.zeros(64, 3, 32, 32)
    labels = torch.zeros(64, dtype=torch.int64)
    best = dict.fromkeys(PRECISIONS, float("inf"))
    for _ in range(repeats):
        for name, precision in PRECISIONS.items():
            best[name] = min(best[name], training_seconds(models.build("resnet32"), precision, (images, labels)))
    return {name: 64 / seconds for name, seconds in best.items()}


def _b0(repeats: int) -> dict[str, float]:
    flat: dict[str, float] = {}
    for precision, suffix in (("float32", ""), ("channels_last", "_channels_last")):
        measured = measure_b0(precision, repeats=repeats)
        for engine, limit in (("inline", "limit1"), ("workers", "limit2"), ("ray", "limit2")):
            middle, low, high = ratio(measured[limit], measured[engine])
            key = f"{engine}{suffix}_over_limit"
            flat |= {key: middle, f"{key}_q1": low, f"{key}_q3": high}
        flat |= {f"b0_fits_per_s_{name}{suffix}": CLIENTS / m.median for name, m in measured.items()}
    return flat


def results(*, repeats: int) -> dict[str, float]:
    """Everything `fl-sim bench engine` reports, as one flat table of numbers."""
    flat = _b0(repeats)
    overhead = measure_overhead(repeats=max(3, repeats // 2))
    flat["noop_467k_inline_ms_per_client"] = 10 * overhead["no-op 467k, inline"].median
    flat["noop_467k_workers_ms_per_client"] = 10 * overhead["no-op 467k, workers"].median
    flat["noop_467k_ray_ms_per_client"] = 10 * overhead["no-op 467k, ray"].median
    flat["many_1000_clients_inline_s_per_round"] = overhead["1k model x 1000, inline"].median
    flat["many_1000_clients_workers_s_per_round"] = overhead["1k model x 1000, workers"].median
    flat |= {f"resnet32_images_per_s_{name}": rate for name, rate in image_rates().items()}
    flat["memory_300_clients_mb"] = processes.peak_memory_mb()
    flat |= {f"first_round_s_{engine}": processes.first_round_s(engine) for engine in ("inline", "workers", "ray")}
    return flat
