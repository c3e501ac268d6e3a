"""Server methods by name: each a few lines of composition.

A preset takes keyword arguments only (from the config's `[strategy]` table) and returns a `Method`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from fl_sim.core.lookup import find, imported
from fl_sim.core.types import MaskRule, UserError
from fl_sim.sparsity import (
    Allocate,
    Cosine,
    Cubic,
    Exponential,
    GlobalMagnitude,
    GrowAtRandom,
    Iterative,
    Linear,
    OneShot,
    PruneAndGrow,
    PruneTo,
    RandomTopk,
    Schedule,
    Shared,
    chain,
    erk,
    keep_zeros,
    lamp,
    uniform,
)
from fl_sim.sparsity.bit_allocation import TYPES, LayerAdaptive
from fl_sim.sparsity.curves import MeasureCurves
from fl_sim.training.losses import Distillation
from strategies.aggregation import coverage_mean, mean, zero_fill
from strategies.base import Method
from strategies.calibration import SOURCES, PruneByDistortion
from strategies.distillation import (
    LearnFromAll,
    ServerDistillation,
    no_distillation,
    server_distillation,
    server_training,
)
from strategies.downlink_types import Adapted
from strategies.privacy import Accountant, PrivateMean
from strategies.robust import ClipNorm, Trimmed, coordinate_median
from strategies.server_step import Aggregate, Momentum, Optimise, replace_params

log = logging.getLogger("fl_sim")
Table = Mapping[str, object]
"""A nested table of the config."""
ALLOCATIONS: Mapping[str, Allocate] = {"uniform": uniform, "erk": erk, "lamp": lamp, "random": RandomTopk()}
GRADUAL: Mapping[str, Callable[[int, int, float], Schedule]] = {
    "cubic": Cubic,
    "linear": Linear,
    "exponential": Exponential,
}
"""(first round, last round, density) -> schedule."""
MOST_KILOBYTES = 1e9
"""Of a payload: more than any model, and a number of bytes that every integer type holds."""
AGGREGATES: Mapping[str, Aggregate] = {
    "mean": mean,
    "coverage": coverage_mean,
    "zero_fill": zero_fill,
    "median": coordinate_median,
}


def _teach(table: Table | None, at: int = 1) -> ServerDistillation:
    if table is not None and at == 0:
        raise UserError(
            "strategy.at = 0: before the first round nothing is distilled; allowed with distil: 1 and later"
        )
    return no_distillation if table is None else server_distillation(**table)  # type: ignore[arg-type]


def fedavg(
    *,
    lr: float = 1.0,
    momentum: float = 0.0,
    aggregate: str = "mean",
    trim: float = 0.1,
    clip: float | None = None,
    mask_rule: str | None = None,
    distil: Table | None = None,
) -> Method:
    """FedAvg (McMahan et al., 2017), with server learning rate and momentum (FedAvgM; Hsu et al., 2019).

    Args:
        lr: server learning rate; 1 takes the mean of the clients.
        momentum: server momentum.
        aggregate: how updates that cover different coordinates are put together: the "mean" of each coordinate, over the
            clients that sent it ("coverage") or, with `wire.error_feedback`, over all ("zero_fill"); or, against bad
            clients, the "median" or the "trimmed" mean (`strategies.robust`); or `module:function` of your own,
            (state, updates) -> parameters.
        trim: share of the values that "trimmed" leaves out at either end.
        clip: largest L2 norm of a client's change, longer ones are scaled down; None = any.
        mask_rule: `module:function`, (round, mask, parameters, pseudo-gradient) -> mask: what is alive from now on.
        distil: server-side distillation after aggregation, see `strategies.distillation.server_distillation`.
    """
    table: Mapping[str, Aggregate] = {**AGGREGATES, "trimmed": Trimmed(trim)}
    chosen = find("strategy.aggregate", aggregate, table)
    return Method(
        aggregate=chosen if clip is None else ClipNorm(clip, chosen),
        adjust_mask=None if mask_rule is None else cast("MaskRule", imported("strategy.mask_rule = ", mask_rule)),
        optimise=_step(lr, momentum),
        distil=_teach(distil),
    )


def _step(lr: float, momentum: float) -> Optimise:
    return replace_params if (lr, momentum) == (1.0, 0.0) else Momentum(lr, momentum)


def private(
    *,
    seed: int,
    num_clients: int,
    cohort_size: int,
    kept: Sequence[str],
    clip: float = 1.0,
    noise: float = 1.0,
    delta: float = 1e-5,
    lr: float = 1.0,
    momentum: float = 0.0,
    shared_density: float | None = None,
) -> Method:
    """Central differential privacy of the clients (DP-FedAvg; McMahan et al., 2018); see `strategies.privacy`.

    `rounds.jsonl` shows the epsilon spent so far. Models without BatchNorm suffer less: statistics are noised too.

    Args:
        seed, num_clients, cohort_size: of the run.
        kept: of the run: by which settings clients may keep something of their data between rounds. Any of them costs the
            amplification by sampling.
        clip: largest L2 norm of a client's change.
        noise: standard deviation of the noise over the sum's sensitivity, 2 clip: `noise = 1` is a noise multiplier of 2
            in the convention of Opacus and of Flower's wrappers.
        delta: the guarantee's second number; below one over the number of clients.
        lr, momentum: server learning rate and momentum.
        shared_density: density of `clients.presets:shared_random`, where the clients use it; noise is on its mask only.
    """
    if shared_density is not None and not 0 <= shared_density <= 1:
        raise UserError(f"strategy.shared_density = {shared_density}: must be from 0 to 1")
    shared = None if shared_density is None else Shared(shared_density, seed)
    if kept:
        log.warning(
            "strategies.presets:private: clients may keep something of their data between rounds (%s): epsilon is "
            "accounted without amplification by sampling",
            ", ".join(kept),
        )
    return Method(
        aggregate=PrivateMean(clip, noise, cohort_size, seed, shared),
        optimise=_step(lr, momentum),
        account=Accountant(noise, cohort_size, num_clients, delta, amplified=not kept),
    )


def _allocation(name: str, min_threshold: float, mt_mode: str) -> Allocate:
    ranked = GlobalMagnitude(min_threshold, mt_mode)
    chosen = find("strategy.allocate", name, {"global": ranked, **ALLOCATIONS})
    if min_threshold and chosen is not ranked:
        raise UserError(f"strategy.min_threshold = {min_threshold}: only for allocate = 'global'; others have min_keep")
    return chosen


def global_magnitude(
    *,
    density: float = 0.1,
    at: int = 1,
    min_keep: int = 0,
    allocate: str = "global",
    min_threshold: float = 0.0,
    mt_mode: str = "exact",
    distil: Table | None = None,
) -> Method:
    """One-shot magnitude pruning of the aggregated model (Global MP, arXiv 2209.14624), then masked training.

    Args:
        density: fraction of prunable weights kept.
        at: after which round the mask is made; 0 prunes the initial model (`model.weights`), before anything is sent.
        min_keep: weights that survive in every layer at least.
        allocate: how many each layer keeps: "global", "uniform", "erk", "lamp", "random", or `module:function`.
        min_threshold: the same in the published unit, percent of all prunable weights; of "global" only.
        mt_mode: "exact", or "published" for the authors' procedure (`fl_sim.sparsity.GlobalMagnitude`).
        distil: server-side distillation after pruning, see `strategies.distillation.server_distillation`.
    """
    rule = PruneTo(OneShot(at, density), _allocation(allocate, min_threshold, mt_mode), min_keep=min_keep)
    return Method(adjust_mask=rule, distil=_teach(distil, at))


def gradual_magnitude(
    *,
    density: float = 0.1,
    start: int = 1,
    end: int = 10,
    schedule: str = "cubic",
    min_keep: int = 0,
    allocate: str = "global",
    min_threshold: float = 0.0,
    mt_mode: str = "exact",
    distil: Table | None = None,
) -> Method:
    """Magnitude pruning step by step between two rounds (Zhu and Gupta, 2017); masks are nested.

    Args:
        density: fraction of prunable weights kept from round `end` on.
        start, end: first and last round of pruning.
        schedule: "cubic", "linear" (as many weights every round), or "exponential" (the same share of what is left).
        min_keep: weights that survive in every layer at least.
        allocate, min_threshold, mt_mode: as `global_magnitude`.
        distil: server-side distillation after each pruning, see `strategies.distillation.server_distillation`.
    """
    chosen = find("strategy.schedule", schedule, GRADUAL)(start, end, density)
    rule = PruneTo(chosen, _allocation(allocate, min_threshold, mt_mode), min_keep=min_keep)
    return Method(adjust_mask=rule, distil=_teach(distil))


def prune_and_grow(
    *,
    seed: int,
    density: float = 0.2,
    at: int = 1,
    allocate: str = "erk",
    fraction: float = 0.3,
    every: int = 5,
    end: int = 100,
) -> Method:
    """A persistent sparse model whose mask moves between rounds (SET; Mocanu et al., 2018): small weights go, others come.

    Downlink, uplink, the clients' memory and MACs shrink to `density`; each exchange costs the difference of two masks.

    Args:
        seed: of the run.
        density: fraction of prunable weights alive after round `at`, from then on.
        at: after which round the first mask is made.
        allocate: how many each layer keeps; see `global_magnitude`.
        fraction: share of each layer's weights exchanged, along half a cosine to 0 in round `end`.
        every: rounds between exchanges.
        end: round of the last exchange.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"strategy.fraction = {fraction}: must be above 0 and at most 1")
    prune = PruneTo(OneShot(at, density), _allocation(allocate, 0.0, "exact"))
    # Masked clients have no gradient of dead weights to tell, so that growth is at random and not RigL's.
    exchange = PruneAndGrow(Cosine(fraction, end), every, grow=GrowAtRandom(seed))
    return Method(adjust_mask=chain(prune, exchange))


def rate_distortion(
    *,
    density: float = 0.1,
    at: int = 1,
    every: int = 1,
    amount: float | None = None,
    curves: str = "clients",
    images: int = 64,
    levels: int = 21,
    summary: str = "mean",
    min_keep: int = 0,
    distil: Table | None = None,
) -> Method:
    """Magnitude pruning with layer densities by rate-distortion (arXiv 2308.10438), measured on clients or the server.

    Args:
        density: fraction of prunable weights kept in the end.
        at: after which round the first mask is made; 0 is before anything is sent.
        every, amount: every so many rounds the share `amount` of what is left goes, until `density` is reached; without
            `amount` everything goes at once.
        curves: who measures: "clients" (kilobytes up), or "server" (on `data.proxy`, or on noise: `data.noise`).
        images: calibration images of each client, or of the server.
        levels: points of a curve; the paper has 101.
        summary: "mean" or "worst" over the images.
        min_keep: weights that survive in every layer at least.
        distil: server-side distillation after each pruning, see `strategies.distillation.server_distillation`.
    """
    source = find("strategy.curves", curves, SOURCES)(MeasureCurves(levels=levels, summary=summary), images)
    schedule: Schedule = OneShot(at, density) if amount is None else Iterative(at, every, amount, density)
    return Method(calibrate=PruneByDistortion(schedule, source, min_keep), distil=_teach(distil, at))


def pruned() -> Method:
    """FedAvg under a fixed mask: what is zero in `model.weights` stays zero, and does not travel."""
    return Method(adjust_mask=keep_zeros)


def layer_adaptive(*, kilobytes: float, images: int = 32, types: Sequence[str] = TYPES) -> Method:
    """FedAvg whose downlink fits a budget: a value type for every layer, with the least output distortion.

    Args:
        kilobytes: of a payload to a client, 1 kB = 1,000 bytes; a mask that has to be sent comes on top.
        images: of the server's images (`data.proxy` or `data.noise`) that the distortion is measured on.
        types: value types on offer, of `fl-sim list`.
    """
    if not 0 < kilobytes <= MOST_KILOBYTES:
        raise UserError(f"strategy.kilobytes = {kilobytes}: must be above 0 and at most {MOST_KILOBYTES:g}")
    return Method(downlink=Adapted(LayerAdaptive(round(1000 * kilobytes), tuple(types)), images))


def mixed_capacities(
    *, steps: int = 50, lr: float = 0.05, batch_size: int = 64, temperature: float = 2.0, alpha: float = 0.5
) -> Method:
    """FedAvg within each capacity; on the server all models learn from their ensemble (FedDF; Lin et al., 2020).

    Args:
        steps, lr, batch_size: of `strategies.distillation.server_training`, each round, for each model.
        temperature, alpha: of `fl_sim.training.losses.Distillation`.
    """
    return Method(couple_models=LearnFromAll(Distillation(temperature, alpha), server_training(steps, lr, batch_size)))
