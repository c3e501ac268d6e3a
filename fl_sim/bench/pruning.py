"""Global selection beside torch's own pruning, and how the allocation program grows with its inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fl_sim.core.seeding import Purpose, generator, numpy_generator
from fl_sim.sparsity import global_topk, global_topk_mask, magnitude, min_distortion, topk_mask

DENSITY = 0.1
# Shares of the weights in layers from small to large, as a residual network has them.
SHARES = (0.001, 0.004, 0.02, 0.075, 0.3, 0.6)


@dataclass(frozen=True)
class Row:
    """Time of one operation at one size.

    Attributes:
        operation: what ran.
        size: weights, or layers x levels x budget.
        seconds: median.
        spread: slowest minus fastest, seconds.
        peak_ratio: peak memory over what was held before, in units of the weights' 4 bytes each; NaN where the system
            does not tell, or where there are no weights.
    """

    operation: str
    size: str
    seconds: float
    spread: float
    peak_ratio: float


def measure(
    *,
    weights: Sequence[int] = (500_000, 11_000_000),
    repeats: int = 5,
    allocations: Sequence[str] = ("smooth", "linear"),
) -> list[Row]:
    """Selection and allocation on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for n in weights for row in _selection(n, repeats)] + [
            row for kind in allocations for row in _allocation(kind, repeats)
        ]
    finally:
        torch.set_num_threads(threads)


def table(rows: Sequence[Row]) -> str:
    """Plain text, one line a row."""
    lines = [f"{'operation':<34}{'size':>28}{'seconds':>10}{'spread':>9}{'peak':>7}"]
    lines += [
        f"{r.operation:<34}{r.size:>28}{r.seconds:>10.4f}{r.spread:>9.4f}"
        + (f"{r.peak_ratio:>7.2f}" if np.isfinite(r.peak_ratio) else f"{'-':>7}")
        for r in rows
    ]
    return "\n".join(lines)


def _selection(total: int, repeats: int) -> list[Row]:
    rng = generator(0, Purpose.DATA)
    params = {f"layer{i}": torch.randn(int(share * total), generator=rng) for i, share in enumerate(SHARES)}
    scores = magnitude(params)
    keep = global_topk(scores, DENSITY)
    operations: dict[str, Callable[[], object]] = {
        "global_topk of scores": lambda: global_topk(scores, DENSITY),
        "magnitude, global_topk, topk_mask": lambda: _masks(params),
        "topk_mask of scores": lambda: topk_mask(scores, keep),
        "global_topk_mask of scores": lambda: global_topk_mask(scores, DENSITY),
        "cat, kthvalue, >= (all ties kept)": lambda: _joined(scores),
        "torch global_unstructured": lambda: _torchs_own(params),
    }
    held = 4 * sum(p.numel() for p in params.values())
    times = _alternating(operations, repeats)
    return [_row(name, f"{total:,} weights", times[name], _peak_bytes(run) / held) for name, run in operations.items()]


def _masks(params: dict[str, Tensor]) -> object:
    scores = magnitude(params)
    return topk_mask(scores, global_topk(scores, DENSITY))


def _joined(scores: dict[str, Tensor]) -> Tensor:
    """The plain way: all scores in one tensor, and what is not below the k-th highest, however many that are."""
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    return flat >= flat.kthvalue(len(flat) - round(DENSITY * len(flat)) + 1).values


def _torchs_own(params: dict[str, Tensor]) -> object:
    """`global_unstructured` on modules that share the weights' memory."""
    layers = []
    for value in params.values():
        layer = nn.Module()
        layer.weight = nn.Parameter(value, requires_grad=False)
        layers.append((layer, "weight"))
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=1 - DENSITY)
    return layers


CURVES: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    # What networks show: distortion grows faster and faster.
    "smooth": lambda rng, pruned: rng.uniform(0.1, 10) * np.expm1(rng.uniform(1, 6) * pruned),
    # The hardest case: every level lies on the Lagrangian bound, nothing is struck out.
    "linear": lambda rng, pruned: pruned * rng.integers(1, 4),
}


def _allocation(kind: str, repeats: int) -> list[Row]:
    rows = []
    for layers, levels, size in ((20, 51, 10_000), (40, 51, 5_000), (20, 101, 10_000), (20, 51, 20_000)):
        rng = numpy_generator(0, Purpose.DATA)
        sizes = rng.integers(size // 10, size, layers)
        rates = [[int(n) - q * int(n) // (levels - 1) for q in range(levels)] for n in sizes]
        curves = [(int(n) * CURVES[kind](rng, np.linspace(0, 1, levels))).tolist() for n in sizes]
        budget = int(sizes.sum() * 0.3)
        spent = _alternating({"": lambda: min_distortion(rates, curves, budget)}, repeats)[""]  # noqa: B023
        rows.append(_row(f"min_distortion, {kind} curves", f"{layers} x {levels} x {budget:,}", spent, float("nan")))
    return rows


def _row(operation: str, size: str, times: list[float], peak: float) -> Row:
    return Row(operation, size, statistics.median(times), max(times) - min(times), peak)


def _alternating(operations: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition; the operations take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(repeats):
        for name, run in operations.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def _peak_bytes(run: Callable[[], object]) -> float:
    """Peak resident bytes of a call above what the process held before; NaN where Linux' counters are missing."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status_bytes("VmRSS")
        run()
        return max(0.0, _status_bytes("VmHWM") - before)
    except OSError:
        return float("nan")


def _status_bytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith(field)))
