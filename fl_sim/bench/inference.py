"""Latency of one image through the dense model and through the gated one that skips, alternating on one core or a GPU."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import UserError
from fl_sim.gating import Gated, Gating
from fl_sim.gating.skipping import exported, folded, skipping
from fl_sim.models import build
from fl_sim.models.macs import count_macs

WARM_UP = 5


@dataclass(frozen=True)
class Row:
    """A contestant: one way of running the model on one image.

    Attributes:
        execution: what ran.
        macs: of one image in millions, gates included.
        microseconds: median latency.
        low, high: quartiles of the latency.
        speedup: median over the repetitions of (dense latency) / (this latency), both of the same repetition.
        speedup_low, speedup_high: its quartiles.
        over_fastest_dense: the same ratio, for the dense execution with the smallest median.
    """

    execution: str
    macs: float
    microseconds: float
    low: float
    high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    over_fastest_dense: float


def measure(
    *,
    model: str = "resnet32",
    budget: float = 0.5,
    gates: Sequence[str] = ("*", "*.conv1"),
    side: int = 32,
    repeats: int = 200,
    device: str = "cpu",
) -> list[Row]:
    """Measure the latency of a new model, gated to `budget` of its MACs in the layers of each pattern in `gates`.

    Latency does not depend on the weights' values, only on how many channels are kept.

    Raises:
        UserError: unknown model, nothing to gate, a budget that cannot be kept, or no such device.
    """
    plain, shape = build(model, image_size=side), (3, side, side)
    gated = {}
    for pattern in gates:
        plan = Gating(macs_budget=budget, keep={pattern: 1.0})
        wrapped = plan.wrap(plain, seed=0)
        wrapped.set_keep(plan.settled(wrapped, shape).keep)
        gated[f"gates at {pattern}"] = wrapped
    return compare(plain, gated, shape, repeats=repeats, device=device)


def compare(
    plain: nn.Module, gated: Mapping[str, Gated], shape: tuple[int, ...], *, repeats: int, device: str
) -> list[Row]:
    """Time every execution in turn, `repeats` times, on one thread."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device = {device!r}: no CUDA device here; allowed: cpu")
    image = torch.randn(1, *shape, generator=generator(0, Purpose.DATA)).to(place)
    plain = copy.deepcopy(plain).eval().to(place)
    dense_macs = count_macs(plain, shape)
    thin = folded(plain)
    last = copy.deepcopy(thin).to(memory_format=torch.channels_last)
    runs: dict[str, tuple[nn.Module, Tensor, int]] = {
        "dense": (plain, image, dense_macs),
        "dense, BatchNorm folded": (thin, image, dense_macs),
        "dense, folded, channels-last": (last, image.contiguous(memory_format=torch.channels_last), dense_macs),
        "dense, folded, exported": (exported(thin, image), image, dense_macs),
    }
    for name, model in gated.items():
        own = copy.deepcopy(model).eval().to(place)
        macs, fast = int(own.count_macs(image)) + own.gate_macs, skipping(own)
        runs[f"{name}, times zero"] = (own, image, macs)
        runs[f"{name}, skipped"] = (fast, image, macs)
        runs[f"{name}, skipped, exported"] = (exported(fast, image), image, macs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _times({name: (model, x) for name, (model, x, _) in runs.items()}, repeats)
    finally:
        torch.set_num_threads(threads)
    fastest = min((n for n in times if n.startswith("dense")), key=lambda n: statistics.median(times[n]))
    return [_row(name, runs[name][2], times[name], times["dense"], times[fastest]) for name in runs]


def _times(runs: Mapping[str, tuple[nn.Module, Tensor]], repeats: int) -> dict[str, list[float]]:
    """Microseconds of every repetition; the executions take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for repeat in range(-WARM_UP, repeats):
            for name, (model, x) in runs.items():
                finish = torch.cuda.synchronize if x.is_cuda else _nothing
                finish()
                start = time.perf_counter()
                model(x)
                finish()
                if repeat >= 0:
                    times[name].append(1e6 * (time.perf_counter() - start))
    return times


def _nothing() -> None:
    """The CPU has nothing to wait for."""


def _row(name: str, macs: int, own: Sequence[float], dense: Sequence[float], fastest: Sequence[float]) -> Row:
    low, middle, high = statistics.quantiles(own, n=4)
    slow, typical, quick = statistics.quantiles([d / o for d, o in zip(dense, own, strict=True)], n=4)
    over = statistics.median(f / o for f, o in zip(fastest, own, strict=True))
    return Row(name, macs / 1e6, middle, low, high, typical, slow, quick, over)
