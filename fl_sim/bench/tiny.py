"""Tiny models by the thousand: whole rounds on the inline and on the cohort engine of a CPU, in turn."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fl_sim.bench.contest import Flat, alternate, federation_rounds, over, spread_of
from fl_sim.bench.workloads import Workload
from fl_sim.core.lookup import find
from fl_sim.core.types import UserError

CLIENTS = 300
"""In the federation; up to so many are in a round."""


def small_cnn(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Two convolutions of 8 and 16 channels and a linear layer, no BatchNorm: 3,818 parameters on 8x8 grey images."""
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * (height // 2) * (width // 2), num_classes),
    )


class RowsGRU(nn.Module):
    """A GRU that reads an image row by row, and a linear layer on its last state."""

    def __init__(self, features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.gru(images.transpose(1, 2).flatten(2))
        return self.head(states[:, -1])  # type: ignore[no-any-return]


def small_gru(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """A GRU of 24 units over the rows of an image: 2,698 parameters on 8x8 grey images."""
    channels, _, width = input_shape
    return RowsGRU(channels * width, 24, num_classes)


def _work(model: str, *, width: float = 1.0, data: str = "small_shape") -> Workload:
    """Five steps of ten samples a client and round."""
    return Workload(model, clients=CLIENTS, cohort=CLIENTS, width=width, batch=10, steps=5, data=data)


WORKS: Mapping[str, Workload] = {
    "mlp": _work("mlp", width=0.5),
    "logistic": _work("linear"),
    "cnn": _work("fl_sim.bench.tiny:small_cnn"),
    "gru": _work("fl_sim.bench.tiny:small_gru"),
    "cnn_bn": _work("cnn_bn"),
    "mlp_784": _work("mlp", width=2.0, data="digit_shape"),
}
"""64-32-10 of 2,410 parameters; logistic regression of 650; 3,818; 2,698; 24,058 with BatchNorm; 784-128-10 of 101,770."""


def measure(
    *,
    works: Sequence[str],
    cohorts: Sequence[int],
    repeats: int,
    overrides: Sequence[str] = (),
    steps: int = 5,
    beside: str = "inline",
    processor_time: bool = False,
) -> Flat:
    """Rounds of each workload and size of cohort, everything encoded, decoded and booked.

    Args:
        works: names of `WORKS`.
        cohorts: clients of a round, up to `CLIENTS`.
        repeats: turns of each engine.
        overrides: as on the command line, for other codecs and masks.
        steps: of a client in a round.
        beside: the other engine: inline, or workers (two processes).
        processor_time: take the seconds of this process's processors, for a machine with other work.

    Returns:
        Client updates a second on each engine, and the paired ratio of both: `mlp_256_cohort_over_inline`, with quartiles.

    Raises:
        UserError: no such model or engine, or the processor time of workers, which are other processes.
    """
    if processor_time and beside != "inline":
        raise UserError(f"--processor-time: --beside {beside} computes in other processes; allowed: inline")
    find("--beside", beside, dict.fromkeys(("inline", "workers")))
    torch.set_num_threads(1)
    flat: Flat = {}
    for name in works:
        work = find("--models", name, WORKS)
        for count in cohorts:
            sized = [f"cohort.size={count}", f"training.steps={steps}", *overrides]
            with ExitStack() as stack:
                running = {
                    engine: stack.enter_context(federation_rounds(work.on(engine, overrides=sized)))
                    for engine in (beside, "cohort")
                }
                found = alternate(
                    running, repeats=repeats, clock=time.process_time if processor_time else time.perf_counter
                )
            for engine, one in found.items():
                flat |= spread_of(f"{name}_{count}_{engine}_updates_per_s", [count / s for s in one.seconds])
            flat |= over(f"{name}_{count}_cohort_over_{beside}", found[beside], found["cohort"])
    return flat
