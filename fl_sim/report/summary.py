"""The numbers of a run: `summary.json`, and the `Report` that holds them with rounds and ledger."""

from __future__ import annotations

import json
import math
import operator
import platform
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fl_sim.communication.estimates import estimate
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.virtual_clock import time_to
from fl_sim.config.experiment import Experiment
from fl_sim.config.toml import Json
from fl_sim.core.errors import in_one_line
from fl_sim.core.files import open_plain, read_plain
from fl_sim.core.types import Params, UserError
from fl_sim.report.flows import Flows
from fl_sim.report.rounds import Rounds
from fl_sim.report.schema import (
    Accuracy,
    ClientScores,
    Density,
    Macs,
    Origin,
    Score,
    Summary,
    check_counts,
    check_rows,
    origin_of,
    summary_of,
)
from fl_sim.report.sizes import size
from fl_sim.training.tasks import CLASSIFICATION, Metric, learning_task

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

LINES = 1000
"""Of rounds.jsonl that are checked together."""
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


class Unfinished(UserError):
    """A run's folder without the results that a finished run leaves there."""


@dataclass(frozen=True, repr=False)
class Report:
    """A run's results.

    Attributes:
        folder: the run folder.
        summary: the content of `summary.json`.
        rounds: the lines of `rounds.jsonl`.
        ledger: every payload that moved.
        params: final global parameters; empty when loaded from a folder without them.
    """

    folder: Path
    summary: Mapping[str, Json]
    rounds: Sequence[Mapping[str, float]]
    ledger: Ledger
    params: Params

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read a finished run's folder.

        Raises:
            Unfinished: the folder holds no summary.json.
            UserError: there is no such folder, or a file of it is damaged.
        """
        folder = Path(folder)
        if folder.is_dir() and not (folder / "summary.json").exists():
            raise Unfinished(f"{folder}: not a finished run; there is no summary.json in it")
        try:
            summary = json.loads(read_plain(folder / "summary.json"))
            rounds = Rounds(_checked_rows(folder))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{folder}: not a finished run ({error.strerror}: {Path(error.filename).name})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{folder}: damaged run folder: {in_one_line(error)}") from error
        summary_of(summary, folder)
        return cls(folder, summary, rounds, Ledger.read(folder / "ledger.parquet"), {})

    @cached_property
    def results(self) -> Summary:
        """The summary with typed fields: `report.results.accuracy.final` is `report.summary["accuracy"]["final"]`.

        Raises:
            UserError: the summary is no summary of a run.
        """
        return summary_of(self.summary, self.folder)

    def __repr__(self) -> str:
        """One line; the content of `summary` alone is 3 kB."""
        try:
            r = self.results
        except UserError as error:
            return f"Report({error})"
        return (
            f"Report({self.folder}: {r.rounds} rounds, test {r.score.name} {r.score.told(r.score.final)}, "
            f"{size(r.uplink_bytes, 3)} up, {size(r.downlink_bytes, 3)} down, saving {100 * r.saving:.2f} %)"
        )

    def __rich__(self) -> Table:
        """Ten entries, for `rich.print` and a console of rich."""
        from rich.table import Table
        from rich.text import Text

        from fl_sim.report.explanation import COLUMN, explanation  # here: it is made of the numbers of this module

        shown = Table.grid()
        shown.add_column(no_wrap=True, min_width=COLUMN)
        shown.add_column(overflow="fold")
        for line in explanation(self):
            shown.add_row(Text(line[:COLUMN]), Text(line[COLUMN:]))
        return shown

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        from fl_sim.report.page import card  # here: it is made of the numbers of this module

        return card(self)

    def frame(self) -> pandas.DataFrame:
        """One row a round: the columns of rounds.jsonl after the run's name, id and seed, so that runs concatenate.

        Raises:
            UserError: pandas is not installed; it is an optional extra.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("Report.frame() needs pandas: pip install 'fl-sim[pandas]'") from error
        return pandas.DataFrame(
            [{**{key: self.summary[key] for key in ("name", "id", "seed")}, **r} for r in self.rounds]
        )

    @cached_property
    def columns(self) -> Rounds:
        """The rounds as columns."""
        return self.rounds if isinstance(self.rounds, Rounds) else Rounds(self.rounds)

    @cached_property
    def flows(self) -> Flows:
        """Sums of the ledger by part, and by client and round."""
        return Flows.of(self.ledger)

    @cached_property
    def config(self) -> Mapping[str, Json]:
        """The resolved config, as it was written.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return tomllib.loads(read_plain(self.folder / "config.toml").decode())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.folder}: damaged run folder: config.toml: {in_one_line(error)}") from error

    @cached_property
    def label_counts(self) -> Sequence[Sequence[int]]:
        """Training samples of each client (row) by class (column); empty where the run did not keep them."""
        counts = self._tree("partition.json")
        return [] if counts is None else check_counts(counts, self.folder)

    @cached_property
    def origin(self) -> Origin | None:
        """Hashes of the run's code and data; None where the run did not keep them."""
        tree = self._tree("identity.json")
        return None if tree is None else origin_of(tree, self.folder)

    def _tree(self, name: str) -> object | None:
        """Content of a JSON file of the run folder; None where there is no such file."""
        try:
            return cast(object, json.loads(read_plain(self.folder / name)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.folder}: damaged run folder: {name}: {in_one_line(error)}") from error


def _checked_rows(folder: Path) -> Iterator[Mapping[str, float]]:
    """The lines of rounds.jsonl, of which some are in memory at a time."""
    with open_plain(folder / "rounds.jsonl") as stream:
        lines, before = iter(stream), 0
        while rows := [json.loads(line, object_hook=_numbers) for line in islice(lines, LINES)]:
            check_rows(rows, folder, before=before)
            before += len(rows)
            yield from rows


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    """A line of rounds.jsonl as it was: null stands for a number that was not finite."""
    return {key: math.nan if value is None else value for key, value in row.items()}


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
    train = ledger.messages(phase="train")
    dense_total, train_bytes = against_dense(ledger, facts.dense_payload_bytes, facts.other_payloads)
    fits = sum(int(row["clients"]) for row in rows)
    sent = ledger.total(by=("direction", "phase"), column="nnz").get(("up", "train"), 0)
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
            uplink_mean=sent / (facts.prunable * train["up"]) if facts.prunable and train.get("up") else 0.0,
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
            return _moved(row)
    return None


def bytes_of_run(report: Report, target: float) -> int | None:
    """`bytes_to` of a run's rounds and its task's metric."""
    score = report.results.score
    reached = partial(operator.le, target) if score.higher else partial(operator.ge, target)
    row = report.columns.first(score.name, reached)
    return None if row is None else _moved(row)


def _moved(row: Mapping[str, float]) -> int:
    moved = row["uplink_bytes"] + row["downlink_bytes"]
    if not math.isfinite(moved):
        raise UserError(f"rounds.jsonl: round {row['round']}: uplink_bytes, downlink_bytes: not numbers")
    return int(moved)
