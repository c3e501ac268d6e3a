"""Rounds of gated clients whose off channels are multiplied by zero, beside clients that cut them out, and beside dense ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from fl_sim.bench.contest import Flat, alternate, federation_rounds, over, spread_of
from fl_sim.bench.workloads import Workload
from fl_sim.config.experiment import Experiment
from fl_sim.core.lookup import find
from fl_sim.training.precision import PRECISIONS

WORK = Workload("resnet32", clients=190, cohort=2, batch=32, steps=8)
"""Two clients of eight batches a round, 466,906 parameters."""
ADAPTIVE = "clients.presets:adaptive_pruning"


def measure(
    *,
    budgets: Sequence[float],
    precisions: Sequence[str],
    repeats: int,
    gates: str = "*",
    work: Workload = WORK,
    engine: str = "inline",
) -> Flat:
    """Whole rounds in turn: dense, masked and cut at each share of the MACs, in each precision.

    `gates` is the pattern of the gated layers.

    Returns:
        Seconds of a round by name, and how many times as fast the cut clients are as the masked and as the dense ones:
        `cut_0.5_over_masked_float32`, with quartiles over the paired turns.

    Raises:
        UserError: an unknown precision.
    """
    flat: Flat = {}
    for precision in precisions:
        find("--precisions", precision, PRECISIONS)
        with ExitStack() as stack:
            running: Mapping[str, Callable[[], None]] = {
                name: stack.enter_context(federation_rounds(experiment))
                for name, experiment in _contestants(work, engine, precision, budgets, gates).items()
            }
            found = alternate(running, repeats=repeats)
        for name, one in found.items():
            flat |= spread_of(f"{name}_{precision}_s_per_round", one.seconds)
        for budget in budgets:
            cut = found[f"cut_{budget:g}"]
            flat |= over(f"cut_{budget:g}_over_masked_{precision}", found[f"masked_{budget:g}"], cut)
            flat |= over(f"cut_{budget:g}_over_dense_{precision}", found["dense"], cut)
    return flat


def _contestants(
    work: Workload, engine: str, precision: str, budgets: Sequence[float], pattern: str
) -> dict[str, Experiment]:
    found: dict[str, list[str]] = {"dense": []}
    for budget in budgets:
        gates = [f"client.target={ADAPTIVE}", "gating.salience=weight", f"gating.macs_budget={budget:g}"]
        gates.append(f'gating.keep={{"{pattern}" = 0.5}}')
        found[f"masked_{budget:g}"] = gates
        found[f"cut_{budget:g}"] = [*gates, "training.cut_channels=true"]
    return {name: work.on(engine, workers=1, precision=precision, overrides=keys) for name, keys in found.items()}
