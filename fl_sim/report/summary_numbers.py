"""Making `summary.json`: what a run measured, said in its numbers."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from fl_sim.communication.estimates import estimate
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.virtual_clock import time_to
from fl_sim.config.experiment import Experiment
from fl_sim.config.toml import Json
from fl_sim.core.types import UserError
from fl_sim.report.schema import Accuracy, ClientScores, Density, Macs, Score, Summary
from fl_sim.training.tasks import CLASSIFICATION, Metric, learning_task

TARGETS = tuple(t / 100 for t in range(10, 100, 5))
R20 = (100, 112, 125, 140, 160, 180, 200, 224, 250, 280, 315, 355, 400, 450, 500, 560, 630, 710, 800, 900)
"""Twenty preferred numbers of a decade, in hundredths."""
PACKAGES = ("fl-sim", "torch", "torchvision", "flwr", "ray", "numpy", "constriction", "zstandard")


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the final model that a summary needs.

    Attributes:
        params: parameters of the model (buffers excluded).
        trainable: those that are trained and travel.
        disabled_features: BatchNorm layer -> share of its channels with |gamma| below 0.01.
        prunable: entries of the weight matrices (`fl_sim.models.prunable_names`), each shared one once.
        density: share of the prunable weights alive.
        dense_payload_bytes: length of one dense float32 payload of the whole model, really encoded.
        other_payloads: (clients, the same of their model), where a federation has several.
        other_prunable: (clients, prunable entries of their model), where a federation has several.
        index_dims: dimensions of a weight tensor, averaged over prunable weights.
        macs_dense, macs: multiply-accumulates of one sample, without and with the mask.
        params_hash: SHA-256 of the final parameters' bytes in schema order.
        failures: failed client tasks by kind.
    """

    params: int
    trainable: int
    disabled_features: Mapping[str, float]
    prunable: int
    density: float
    dense_payload_bytes: int
    macs_dense: int
    index_dims: float
    macs: int
    params_hash: str
    failures: Mapping[str, int]
    other_payloads: Sequence[tuple[Sequence[int], int]] = ()
    other_prunable: Sequence[tuple[Sequence[int], int]] = ()


def against_dense(
    ledger: Ledger, payload: int, others: Sequence[tuple[Sequence[int], int]] = (), *, start: int = 0
) -> tuple[int, int]:
    """(what the messages of the training phase cost as dense payloads, what they cost, measurements on clients included).

    `payload` is the length of a dense payload, `others` of (clients, the same of their model). Counts the messages from
    row `start` of the ledger on.
    """
    dense = payload * sum(ledger.messages(phase="train", start=start).values())
    for clients, theirs in others:
        dense += (theirs - payload) * sum(ledger.messages(phase="train", clients=clients, start=start).values())
    by_phase = ledger.total(by=("phase",), start=start)
    return dense, by_phase.get(("train",), 0) + by_phase.get(("query",), 0)


def _sent(ledger: Ledger, facts: ModelFacts) -> float:
    """Share of the prunable weights in the uploads of training, each of its client's own model."""
    whole = facts.prunable * ledger.messages(phase="train").get("up", 0)
    for clients, theirs in facts.other_prunable:
        whole += (theirs - facts.prunable) * ledger.messages(phase="train", clients=clients).get("up", 0)
    sent = ledger.total(by=("direction", "phase"), column="nnz").get(("up", "train"), 0)
    return sent / whole if whole else 0.0


def summarise(
    experiment: Experiment,
    *,
    rows: Sequence[Mapping[str, float]],
    ledger: Ledger,
    facts: ModelFacts,
    precision: str,
    wall_s: float,
    training_s: float,
    stopped: str | None = None,
) -> dict[str, Json]:
    """The content of `summary.json`.

    `metric.best_by_validation` is the test metric of the evaluated round with the best validation metric, which may be
    worse than `final`: the test set chooses nothing. `dense_total_bytes` is what the same messages of the training phase
    cost as dense float32 payloads. `saving` is 1 - measured / dense, both directions, masks, headers and measurements on
    clients included.
    """
    metric = learning_task(experiment.task).metric
    evaluated = [row for row in rows if metric.name in row]
    score = _score(metric, evaluated, len(rows))
    classes = metric == CLASSIFICATION.metric
    targets, others = (TARGETS, []) if classes else ((), passed(metric, evaluated))
    measured = ledger.total(by=("direction",))
    up, down = measured.get(("up",), 0), measured.get(("down",), 0)
    dense_total, train_bytes = against_dense(ledger, facts.dense_payload_bytes, facts.other_payloads)
    fits = sum(int(row["clients"]) for row in rows)
    summary = Summary(
        name=experiment.name,
        id=experiment.id,
        seed=experiment.seed,
        engine=experiment.engine,
        rounds=len(rows),
        stopped=stopped,
        num_clients=experiment.data.clients,
        metric=score,
        metrics={name: _finite(evaluated[-1].get(name, math.nan)) for name in experiment.evaluate.metrics},
        clients=_of_clients(metric, rows),
        accuracy=Accuracy.model_validate(score.model_dump()) if classes else None,
        uplink_bytes=up,
        downlink_bytes=down,
        total_bytes=up + down,
        dense_total_bytes=dense_total,
        saving=1 - train_bytes / dense_total if dense_total else 0.0,
        bytes_to_accuracy={f"{target:.2f}": bytes_to(evaluated, target) for target in targets},
        time_to_accuracy={f"{target:.2f}": time_to(evaluated, target) for target in targets},
        bytes_to_metric={f"{x:g}": bytes_to(evaluated, x, metric.name, higher=metric.higher) for x in others},
        time_to_metric={f"{x:g}": time_to(evaluated, x, metric.name, higher=metric.higher) for x in others},
        simulated_s=rows[-1].get("simulated_s"),
        mask_bytes=ledger.total(where={"section": "mask"})[()],
        mask_floor_bytes=round(sum(ledger.total(by=(), column="entropy_bytes").values())),
        protocol_bytes=sum(ledger.total(by=(), column="protocol_bytes").values()),
        estimates=dict(estimate(ledger, index_dims=facts.index_dims)),
        density=Density(
            prunable=facts.density,
            model=(facts.params - facts.prunable * (1 - facts.density)) / facts.params,
            uplink_mean=_sent(ledger, facts),
        ),
        macs=Macs(dense=facts.macs_dense, mean=facts.macs),
        params=facts.params,
        trainable_params=facts.trainable,
        disabled_features=dict(facts.disabled_features),
        params_sha256=facts.params_hash,
        wall_s=round(wall_s, 3),
        client_fits_per_s=round(fits / training_s, 3) if training_s else 0.0,
        failures=dict(facts.failures),
        precision=precision,
        versions=dict(_versions()),
    )
    return summary.model_dump()


@cache
def _versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that decide a run's numbers; looking them up takes as long as a small round."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _score(metric: Metric, evaluated: Sequence[Mapping[str, float]], rounds: int) -> Score:
    """The metric over the rounds that were evaluated."""
    last10 = [row[metric.name] for row in evaluated if row["round"] > rounds - 10]
    validation = f"validation_{metric.name}"
    known = [row for row in evaluated if math.isfinite(row.get(validation, math.nan))]
    best = max(known, key=lambda row: row[validation] if metric.higher else -row[validation]) if known else None
    return Score(
        name=metric.name,
        higher=metric.higher,
        percent=metric.percent,
        final=_finite(evaluated[-1][metric.name]),
        last10_mean=_finite(sum(last10) / len(last10)),
        best_by_validation=None if best is None else _finite(best[metric.name]),
    )


def _of_clients(metric: Metric, rows: Sequence[Mapping[str, float]]) -> ClientScores | None:
    """The metric over the clients that evaluated last; None where none did."""
    start = f"clients_{metric.name}"
    row = next((row for row in reversed(rows) if start in row), None)
    if row is None:
        return None
    mean, low, high, worst = (
        _finite(row.get(start + end, math.nan)) for end in ("", "_p10", "_p90", "_min" if metric.higher else "_max")
    )
    return ClientScores(mean=mean, p10=low, p90=high, worst=worst)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def passed(metric: Metric, evaluated: Sequence[Mapping[str, float]]) -> list[float]:
    """Levels of a metric that a run's evaluations lie around, the same for every run: shares in steps of 5 points, positive
    numbers in twenty steps a decade (ISO 3, R20)."""
    known = [row[metric.name] for row in evaluated if math.isfinite(row[metric.name])]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if metric.percent:
        return [level for level in TARGETS if low <= level <= high]
    if high <= 0:
        return []
    decades = range(math.floor(math.log10(max(low, 1e-6 * high))), math.floor(math.log10(high)) + 1)
    levels = [float(f"{step}e{decade - 2}") for decade in decades for step in R20]
    return [level for level in levels if low <= level <= high]


def bytes_to(
    evaluated: Sequence[Mapping[str, float]], target: float, metric: str = "accuracy", *, higher: bool = True
) -> int | None:
    """Bytes of both directions until the test metric of the evaluated rounds first reached `target`; None = not reached.

    Raises:
        UserError: the round that reached it has no number of bytes, as in a damaged rounds.jsonl.
    """
    for row in evaluated:
        if row[metric] >= target if higher else row[metric] <= target:
            return moved(row)
    return None


def moved(row: Mapping[str, float]) -> int:
    """Bytes of both directions up to a round.

    Raises:
        UserError: they are no numbers, as in a damaged rounds.jsonl.
    """
    moved = row["uplink_bytes"] + row["downlink_bytes"]
    if not math.isfinite(moved):
        raise UserError(f"rounds.jsonl: round {row['round']}: uplink_bytes, downlink_bytes: not numbers")
    return int(moved)
