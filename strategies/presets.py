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
from fl_sim.training.loop import Training
from fl_sim.training.losses import Distillation
from strategies.adaptive import Adaptive, adagrad, adam, yogi
from strategies.aggregation import EQUAL, coverage_mean, mean, zero_fill
from strategies.base import Method
from strategies.calibration import SOURCES, PruneByDistortion
from strategies.corrections import ControlVariates, DynamicRegularisation, FairMean, NormalisedMean
from strategies.distillation import (
    LearnFromAll,
    ServerDistillation,
    no_distillation,
    server_distillation,
    server_training,
)
from strategies.downlink_types import Adapted
from strategies.extrapolation import Extrapolated
from strategies.majority_vote import MajorityVote
from strategies.privacy import Accountant, PrivateMean
from strategies.robust import ClipNorm, Trimmed, coordinate_median
from strategies.robust_distance import Krum, geometric_median
from strategies.selection import PowerOfChoice, Select, by_size
from strategies.selection import uniform as uniform_clients
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
    "geometric_median": geometric_median,
    "equal": EQUAL,
}
SELECTIONS: Mapping[str, Select] = {"uniform": uniform_clients, "by_size": by_size}


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
    byzantine: float = 0.2,
    clip: float | None = None,
    cohort_size: int | None = None,
    select: str = "uniform",
    mask_rule: str | None = None,
    distil: Table | None = None,
) -> Method:
    """FedAvg (McMahan et al., 2017), with server learning rate and momentum (FedAvgM; Hsu et al., 2019).

    Args:
        lr: server learning rate, above 0; 1 takes the clients' mean.
        momentum: server momentum, from 0 to below 1.
        aggregate: aggregation rule. "coverage": weighted mean over the clients that sent a coordinate. "zero_fill": over all
            clients of the round. "mean": zero_fill with `wire.error_feedback`, else coverage. "median" and "trimmed":
            coordinate-wise, robust to bad clients. "krum", "multi_krum", "geometric_median": by distances between updates.
            "equal": every client counts once. Or `module:function`, (state, updates) -> parameters.
        trim: share of the values that "trimmed" leaves out at each end, from 0 to below 0.5.
        byzantine: share of a round's updates that "krum" and "multi_krum" count as bad, rounded down, from 0 to below 0.5.
        cohort_size: of the run.
        clip: largest L2 norm of a client's change, above 0; longer changes are scaled down. Unset = no clipping.
        select: which clients train in a round. "uniform": each with the same probability. "by_size": in proportion to its
            samples, which goes with aggregate = "equal". Or `module:function`, a `strategies.selection.Request` -> clients.
        mask_rule: pruning mask of your own: `module:function`, (round, mask, parameters, pseudo-gradient) -> mask.
        distil: server-side distillation after aggregation, see `[strategy.distil]`.
    """
    table: Mapping[str, Aggregate] = {
        **AGGREGATES,
        "trimmed": Trimmed(trim),
        "krum": Krum(byzantine),
        "multi_krum": Krum(byzantine, many=True),
    }
    chosen = find("strategy.aggregate", aggregate, table)
    if isinstance(chosen, Krum) and cohort_size is not None:
        chosen.require_enough(cohort_size)
    return Method(
        aggregate=chosen if clip is None else ClipNorm(clip, chosen),
        adjust_mask=None if mask_rule is None else cast("MaskRule", imported("strategy.mask_rule = ", mask_rule)),
        optimise=_step(lr, momentum),
        select=find("strategy.select", select, SELECTIONS),
        distil=_teach(distil),
    )


def signsgd(*, lr: float = 0.001) -> Method:
    """signSGD with majority vote (Bernstein et al., 2018, algorithm 3). Goes with `wire.codec.uplink = "signsgd"`.

    Args:
        lr: step of every weight in a round, above 0.
    """
    return Method(aggregate=MajorityVote(lr))


def power_of_choice(*, candidates: int = 10) -> Method:
    """FedAvg of the clients with the largest loss among candidates (Cho, Wang and Joshi, 2020, section 3).

    Each candidate is sent the model and answers its loss: these bytes are booked in the phase `query`.

    Args:
        candidates: d of the paper, at least the size of a cohort.
    """
    return Method(aggregate=EQUAL, select=PowerOfChoice(candidates))


def _step(lr: float, momentum: float) -> Optimise:
    return replace_params if (lr, momentum) == (1.0, 0.0) else Momentum(lr, momentum)


def fedexp(*, epsilon: float = 1e-3) -> Method:
    """FedExP (Jhunjhunwala et al., ICLR 2023): FedAvg with a server step that adapts to the clients' disagreement.

    Args:
        epsilon: keeps the step finite where the mean change vanishes, in units of a squared norm, above 0; the paper's
            experiments use 0.001.
    """
    return Method(aggregate=Extrapolated(epsilon))


def fedavgm(*, lr: float = 1.0, momentum: float = 0.9) -> Method:
    """FedAvgM (Hsu et al., 2019): server momentum. BatchNorm statistics take the mean; they are no parameters.

    Args:
        lr: server learning rate, above 0.
        momentum: server momentum, from 0 to below 1.
    """
    return Method(optimise=Momentum(lr, momentum))


def fedadam(*, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedAdam (Reddi et al., 2021, algorithm 2): Adam on the server, on the clients' mean change.

    Args:
        lr: server learning rate, above 0; about the size of a weight's step in a round.
        beta1: decay of the first moment, from 0 to below 1.
        beta2: decay of the second moment, from 0 to below 1.
        tau: smallest denominator, above 0.
    """
    return Method(optimise=Adaptive(adam, lr, beta1, beta2, tau))


def fedyogi(*, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedYogi (Reddi et al., 2021, algorithm 2): Yogi on the server, on the clients' mean change.

    Args:
        lr, beta1, beta2, tau: as in `fedadam`.
    """
    return Method(optimise=Adaptive(yogi, lr, beta1, beta2, tau))


def fedadagrad(*, lr: float = 0.01, beta1: float = 0.0, tau: float = 1e-3) -> Method:
    """FedAdagrad (Reddi et al., 2021, algorithm 2): Adagrad on the server, on the clients' mean change.

    Args:
        lr, beta1, tau: as in `fedadam`.
    """
    return Method(optimise=Adaptive(adagrad, lr, beta1, 0.0, tau))


def scaffold(*, lr: float = 1.0) -> Method:
    """SCAFFOLD (Karimireddy et al., 2020, algorithm 1): control variates travel both ways. Goes with `clients.presets:scaffold`.

    Args:
        lr: global learning rate, above 0; 1 takes the clients' unweighted mean.
    """
    control = ControlVariates(lr)
    return Method(aggregate=EQUAL, optimise=control, send=control.send, takes=("control",))


def feddyn(*, alpha: float = 0.01) -> Method:
    """FedDyn (Acar et al., 2021, algorithm 1): dynamic regularisation. Goes with `clients.presets:feddyn`.

    Args:
        alpha: weight of the regularisation, above 0; the clients are sent it.
    """
    dynamic = DynamicRegularisation(alpha)
    return Method(aggregate=EQUAL, optimise=dynamic, send=dynamic.send)


def fednova() -> Method:
    """FedNova (Wang et al., 2020, eq. 6 and 7): averages changes per local step. Goes with `clients.presets:fednova`."""
    return Method(aggregate=NormalisedMean(), takes=("steps",))


def qfedavg(*, training: Training, q: float = 1.0) -> Method:
    """q-FedAvg (Li et al., 2020, algorithm 2): clients with a larger loss weigh more. Goes with `clients.presets:qfedavg`.

    Args:
        training: the config's `[training]` table, whose learning rate gives the Lipschitz constant 1 / lr.
        q: fairness, from 0 to 100; 0 weighs all clients alike.
    """
    return Method(aggregate=FairMean(q, training), takes=("loss",))


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
        clip: largest L2 norm of a client's change, above 0; longer changes are scaled down.
        noise: standard deviation of the noise, in units of the sum's sensitivity 2 clip. `noise = 1` is a noise multiplier
            of 2 in the convention of Opacus and of Flower's wrappers.
        delta: delta of (epsilon, delta), between 0 and 1; choose it below 1 / number of clients.
        lr: server learning rate, above 0; 1 takes the clients' mean.
        momentum: server momentum, from 0 to below 1.
        shared_density: density of `clients.presets:shared_random` where the clients use that preset; noise is then added on
            the shared mask only. Unset = noise on every coordinate.
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
        density: share of the prunable weights kept.
        at: round after which the model is pruned; 0 = the first model (`model.weights`), before anything is sent.
        min_keep: fewest weights that each layer keeps.
        allocate: how many weights each layer keeps: "global" (one threshold over all layers), "uniform", "erk", "lamp",
            "random" (control), or `module:function`.
        min_threshold: as `min_keep`, in the paper's unit: percent of all prunable weights; for allocate = "global" alone.
        mt_mode: "exact", or "published" for the authors' procedure (`fl_sim.sparsity.GlobalMagnitude`).
        distil: server-side distillation after pruning, see `[strategy.distil]`.
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
        density: share of the prunable weights kept from round `end` on.
        start: last round after which the model is still dense.
        end: round after which `density` is reached.
        schedule: "cubic", "linear" (as many weights every round), or "exponential" (the same share of what is left).
        min_keep: fewest weights that each layer keeps.
        allocate, min_threshold, mt_mode: as in `global_magnitude`.
        distil: server-side distillation after each pruning, see `[strategy.distil]`.
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
    """Dynamic sparse training (SET; Mocanu et al., 2018): every few rounds small weights are pruned and others grown.

    Downlink, uplink, the clients' memory and MACs shrink to `density`; each exchange costs the difference of two masks.

    Args:
        seed: of the run.
        density: share of the prunable weights kept after round `at`.
        at: round after which the model is pruned first.
        allocate: how many weights each layer keeps, as in `global_magnitude`.
        fraction: share of each layer's weights that an exchange prunes and grows, above 0 and at most 1; it falls along half
            a cosine to 0 in round `end`.
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
        density: share of the prunable weights kept in the end.
        at: round after which the model is pruned first; 0 = before anything is sent.
        every: rounds between two prunings, where `amount` is given.
        amount: share of the remaining weights that each pruning removes until `density` is reached; unset = one pruning.
        curves: who measures the distortion curves: "clients" (some kilobytes up), or "server" (on `data.proxy` or
            `data.noise`).
        images: calibration images of each client, or of the server.
        levels: points of a curve, at least 2; the paper has 101.
        summary: distortion over the images: "mean" or "worst".
        min_keep: fewest weights that each layer keeps.
        distil: server-side distillation after each pruning, see `[strategy.distil]`.
    """
    source = find("strategy.curves", curves, SOURCES)(MeasureCurves(levels=levels, summary=summary), images)
    schedule: Schedule = OneShot(at, density) if amount is None else Iterative(at, every, amount, density)
    return Method(calibrate=PruneByDistortion(schedule, source, min_keep), distil=_teach(distil, at))


def pruned() -> Method:
    """FedAvg under a fixed mask: weights that are zero in `model.weights` stay zero and are not sent."""
    return Method(adjust_mask=keep_zeros)


def layer_adaptive(*, kilobytes: float, images: int = 32, types: Sequence[str] = TYPES) -> Method:
    """FedAvg with a downlink byte budget: chooses a value type for each layer, with the least output distortion.

    Args:
        kilobytes: largest payload of values to a client, in kB of 1,000 bytes; a mask that has to be sent comes on top.
        images: number of the server's images (`data.proxy` or `data.noise`) that the distortion is measured on.
        types: value types to choose from, as in `[wire.uplink]`.
    """
    if not 0 < kilobytes <= MOST_KILOBYTES:
        raise UserError(f"strategy.kilobytes = {kilobytes}: must be above 0 and at most {MOST_KILOBYTES:g}")
    return Method(downlink=Adapted(LayerAdaptive(round(1000 * kilobytes), tuple(types)), images))


def mixed_capacities(
    *, steps: int = 50, lr: float = 0.05, batch_size: int = 64, temperature: float = 2.0, alpha: float = 0.5
) -> Method:
    """FedAvg within each capacity; on the server all models learn from their ensemble (FedDF; Lin et al., 2020).

    Args:
        steps: SGD steps on the server's images in each round, for each model.
        lr: learning rate of these steps, above 0; momentum 0.9, cosine schedule, gradients clipped at norm 1.
        batch_size: images per step.
        temperature: softens the logits of teacher and student, above 0.
        alpha: weight of the teacher's loss, from 0 to 1; the labels' loss has 1 - alpha.
    """
    return Method(couple_models=LearnFromAll(Distillation(temperature, alpha), server_training(steps, lr, batch_size)))
