"""Engine benchmark: speed beside a bare PyTorch loop, overhead of clients that do nothing, and time to start.

Ratios are medians with their quartiles: over starts where contestants are started alone, else over paired repetitions. Every
part can be measured alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from fl_sim import models
from fl_sim.bench import apps, flower, folding, processes, scale, tasks, workloads
from fl_sim.bench.bare import Bare, spread
from fl_sim.bench.contest import Flat, alternate, each_alone, federation_rounds, over, spread_of
from fl_sim.bench.idle import idle_shares
from fl_sim.bench.workloads import Workload
from fl_sim.config.experiment import Experiment
from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation
from fl_sim.training.precision import PRECISIONS, training_seconds

ENGINES: Mapping[str, str] = {"inline": "limit1", "workers": "limit2", "ray": "limit2"}
"""Engine -> what it is measured against: bare PyTorch in one process, or in two."""
LIMITS: Mapping[str, int] = {"limit1": 1, "limit2": 2}
"""Limit -> its processes."""
LOCAL = ("inline", "workers")


def beside_limit(
    name: str, work: Workload, *, repeats: int, suffix: str = "", precision: str = "float32", engines: Sequence[str]
) -> Flat:
    """The engines (two processes each) and their limits, each started alone in turn: ratios, and client fits a second of each.

    The limit is the fastest of the bare loop's starts; fits a second are medians, the bare loop's too.
    """
    torch.set_num_threads(1)
    bare, asked = Bare.of(work), {ENGINES[engine] for engine in engines}
    measured = each_alone(
        {
            **{limit: partial(spread, bare, count) for limit, count in LIMITS.items() if limit in asked},
            **{e: partial(federation_rounds, work.on(e, precision=precision)) for e in engines},
        },
        starts=max(2, repeats // 3),
    )
    flat: Flat = {}
    for engine in engines:
        limit = measured[ENGINES[engine]].best
        flat |= spread_of(f"{engine}{suffix}_over_limit", [limit / seconds for seconds in measured[engine].seconds])
    return flat | {f"{name}_fits_per_s_{who}{suffix}": work.cohort / m.median for who, m in measured.items()}


def b0(repeats: int) -> Flat:
    """`cnn` beside the limit, in float32 as the limit is, and in the channels-last layout."""
    return {
        **beside_limit("b0", workloads.B0, repeats=repeats, engines=list(ENGINES)),
        **beside_limit(
            "b0",
            workloads.B0,
            repeats=repeats,
            suffix="_channels_last",
            precision="channels_last",
            engines=list(ENGINES),
        ),
    }


def small(repeats: int) -> Flat:
    """B0 with 50,624 parameters, in float32 as the limit is, and in the precision that the probe picks here."""
    chosen = _picked(workloads.B0_SMALL)
    picked = beside_limit(
        "small", workloads.B0_SMALL, repeats=repeats, suffix="_small_auto", precision=chosen, engines=list(ENGINES)
    )
    plain = beside_limit("small", workloads.B0_SMALL, repeats=repeats, suffix="_small", engines=list(ENGINES))
    return {**plain, "small_precision": chosen, **picked}


def resnet32(repeats: int, work: Workload = workloads.RESNET32) -> Flat:
    """ResNet-32 in the precision that the probe picks here, beside the plain float32 loop."""
    chosen = _picked(work)
    found = beside_limit("resnet32", work, repeats=repeats, suffix="_resnet32", precision=chosen, engines=list(ENGINES))
    return {"resnet32_precision": chosen, **found}


def _picked(work: Workload) -> str:
    """Precision that `precision = "auto"` chooses on this machine."""
    return Federation.build(work.on("inline", precision="auto")).experiment.training.precision


def overhead(repeats: int) -> Flat:
    """Rounds of clients that do nothing: what the framework itself costs."""
    flat: Flat = {}
    for engine, seconds in _noop(workloads.no_op, list(ENGINES), repeats).items():
        flat |= spread_of(f"noop_467k_{engine}_ms_per_client", [1e3 * s / 100 for s in seconds])
    for engine, seconds in _noop(workloads.many, LOCAL, repeats).items():
        flat |= spread_of(f"many_1000_clients_{engine}_s_per_round", seconds)
    for engine, seconds in _noop(partial(workloads.many, clients=10_000), LOCAL, repeats).items():
        flat |= spread_of(f"many_10000_clients_{engine}_ms_per_client", seconds)
    return flat


def _noop(
    experiment: Callable[[str], Experiment], engines: Sequence[str], repeats: int
) -> dict[str, tuple[float, ...]]:
    """Seconds of rounds on each engine, in turn."""
    with ExitStack() as stack:
        running = {engine: stack.enter_context(federation_rounds(experiment(engine))) for engine in engines}
        measured = alternate(running, repeats=max(3, repeats // 2))
    return {engine: each.seconds for engine, each in measured.items()}


def rates(repeats: int) -> Flat:
    """ResNet-32, batch 64, one thread: training images a second in each precision; the best of alternated repeats."""
    torch.set_num_threads(1)
    images = torch.zeros(64, 3, 32, 32)
    best = dict.fromkeys(PRECISIONS, float("inf"))
    for _ in range(max(3, repeats // 5)):
        for name, precision in PRECISIONS.items():
            best[name] = min(best[name], training_seconds(models.build("resnet32"), precision, images))
    return {f"resnet32_images_per_s_{name}": 64 / seconds for name, seconds in best.items()}


def idle(repeats: int, work: Workload = workloads.SKEWED) -> Flat:
    """Share of the workers' time in which they train nobody, under label skew."""
    return idle_shares(work, ["workers", "ray"], repeats=max(3, repeats // 2))


def memory(repeats: int) -> Flat:
    """Peak memory of a round of 300 clients, in a process of its own."""
    return {"memory_300_clients_mb": processes.peak_memory_mb()}


def start(repeats: int) -> Flat:
    """From the start of `fl-sim run` on digits to its first finished round."""
    flat: Flat = {}
    for engine in ENGINES:
        flat |= spread_of(f"first_round_s_{engine}", [processes.first_round_s(engine) for _ in range(3)])
    return flat


def with_flower(repeats: int) -> Flat:
    """Flower's own simulation of the same apps, beside the two-process limit."""
    flat: Flat = {}
    for name, work in {"": workloads.B0, "_small": workloads.B0_SMALL}.items():
        torch.set_num_threads(1)
        with spread(Bare.of(work), 2) as limit:
            measured = flower.beside(work.on("flower"), {"limit2": limit}, repeats=repeats)
        flat |= over(f"flower{name}_over_limit", measured["limit2"], measured["flower"])
    return flat


Part = Callable[[int], Flat]
"""(repetitions) -> numbers."""
PARTS: Mapping[str, Part] = {
    "b0": b0,
    "small": small,
    "resnet32": resnet32,
    "overhead": overhead,
    "rates": rates,
    "idle": idle,
    "memory": memory,
    "start": start,
    "tasks": tasks.results,
}
OPTIONAL: Mapping[str, Part] = {
    "flower": with_flower,
    "app": apps.beside_flower,
    "scale": scale.results,
    "fold": folding.results,
}
"""Measured only when asked for."""


def results(parts: Sequence[str], *, repeats: int) -> Flat:
    """Measure the named parts and return one flat table, as `fl-sim bench engine` prints it.

    Raises:
        UserError: no such part.
    """
    known = {**PARTS, **OPTIONAL}
    if unknown := [name for name in parts if name not in known]:
        raise UserError(f"--only {unknown[0]!r}: allowed: {', '.join(known)}")
    flat: Flat = {}
    for name in dict.fromkeys(parts):
        flat |= known[name](repeats)
    return flat
