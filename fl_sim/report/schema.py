"""The schema of a run folder's JSON files: `Summary` is the one home of every key of summary.json.

A run folder may be from anywhere, so that files are checked before anything of them is shown. The JSON schema for other
programs is docs/summary.schema.json, written by `python -m fl_sim.report.schema`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from fl_sim.core.types import UserError

T = TypeVar("T")


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds control characters")  # a terminal would obey them
    return text


Word = Annotated[str, StringConstraints(max_length=400), AfterValidator(_printable)]
Level = Annotated[str, StringConstraints(pattern=r"^[01]\.\d{1,6}$")]
"""A test accuracy as a key: "0.85"."""
MetricLevel = Annotated[str, StringConstraints(pattern=r"^\d{1,30}(\.\d{1,30})?(e[+-]\d{1,3})?$")]
"""A value of another metric as a key: "4.5"."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    """Values of exactly the declared types; keys of other versions are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class Accuracy(_Strict):
    """Test accuracies of the evaluated rounds, 0 to 1."""

    final: Number = Field(description="test accuracy of the last evaluation")
    last10_mean: Number = Field(description="mean over the evaluations in the last ten rounds")
    best_by_validation: Number | None = Field(
        description="test accuracy of the evaluation with the best validation accuracy; may be below final; null: no "
        "validation set"
    )


class Score(_Strict):
    """The metric of the task on the test set of the evaluated rounds; null where it is not finite."""

    name: Word = Field(description="the metric, a column of rounds.jsonl")
    higher: bool = Field(description="whether a higher value is better")
    percent: bool = Field(description="whether it is a share from 0 to 1, which readers see in percent")
    final: Number | None = Field(description="of the last evaluation")
    last10_mean: Number | None = Field(description="mean over the evaluations in the last ten rounds")
    best_by_validation: Number | None = Field(
        description="of the evaluation with the best value on the validation set; null: no validation set"
    )

    @property
    def scale(self) -> float:
        """What a value is multiplied by for a reader."""
        return 100.0 if self.percent else 1.0

    def told(self, value: float | None) -> str:
        """One of its values for a reader, with its unit."""
        return "not finite" if value is None else self.text(self.scale * value)

    @property
    def unit(self) -> str:
        """The unit of a value for a reader; empty without one."""
        return "%" if self.percent else ""

    @property
    def heading(self) -> str:
        """Name and unit."""
        return f"{self.name} [%]" if self.percent else self.name

    @property
    def title(self) -> str:
        """The name at the start of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    def text(self, value: float) -> str:
        """A value in the reader's unit, with the unit."""
        return f"{value:.2f} {self.unit}".rstrip()


class ClientScores(_Strict):
    """The metric of the task over the clients that evaluated last, each on test samples of its kind; null where not finite."""

    mean: Number | None = Field(description="mean over clients, weighted by their test samples")
    p10: Number | None = Field(description="what a tenth of the clients are below")
    p90: Number | None = Field(description="what nine tenths of the clients are below")
    worst: Number | None = Field(description="of the worst client: the lowest, or the highest where lower is better")


class Density(_Strict):
    """Shares of weights that are alive or sent, 0 to 1."""

    prunable: Number = Field(description="share of the prunable weights that the final mask keeps")
    model: Number = Field(description="the same share of all parameters")
    uplink_mean: Number = Field(description="mean share of the prunable weights of its client's model in an upload")


class Macs(_Strict):
    """Multiply-accumulates of one sample."""

    dense: Count = Field(description="without any mask")
    mean: Count = Field(description="with the final mask")


class Summary(_Strict):
    """The content of summary.json: the results of one run. Bytes are lengths of encoded payloads."""

    name: Word = Field(description="the experiment's name")
    id: Word = Field(description="eight hex digits of the config keys that determine the result")
    seed: int = Field(description="seed of the run", ge=-(2**63), lt=2**63)
    engine: Word = Field(description="runtime that trained the clients")
    rounds: Count = Field(description="rounds that were run")
    stopped: Word | None = Field(
        None, description="why the run ended before the last round of its config; null: it did not"
    )
    num_clients: Count = Field(description="clients of the federation")
    metric: Score | None = Field(
        None, description="what the task is measured by; null in folders of versions that knew accuracy alone"
    )
    metrics: dict[Word, Number | None] = Field(
        {}, description="further metrics of the last evaluation (evaluate.metrics); null where not finite"
    )
    clients: ClientScores | None = Field(
        None,
        description="the metric over the clients that evaluated in the last round; null: none did (evaluate.clients)",
    )
    accuracy: Accuracy | None = Field(description="of a classification; null: another task, see metric")
    uplink_bytes: Count = Field(description="from clients to the server, every phase")
    downlink_bytes: Count = Field(description="from the server to clients, every phase")
    total_bytes: Count = Field(description="both directions")
    dense_total_bytes: Count = Field(description="the training messages, had each been a dense float32 payload")
    saving: Number = Field(description="1 - measured / dense; masks, headers and client measurements included")
    bytes_to_accuracy: dict[Level, Count | None] = Field(
        description="test accuracy -> bytes of both directions until it was first reached; null: never; empty: another task"
    )
    time_to_accuracy: dict[Level, Number | None] = Field(
        description="test accuracy -> simulated seconds until it was first reached; null: never, or no virtual clock; "
        "empty: another task"
    )
    bytes_to_metric: dict[MetricLevel, Count | None] = Field(
        {}, description="the same of another task's metric, at levels that the run passed; empty: see bytes_to_accuracy"
    )
    time_to_metric: dict[MetricLevel, Number | None] = Field(
        {}, description="simulated seconds to these levels; empty: see time_to_accuracy"
    )
    simulated_s: Number | None = Field(description="simulated seconds of the run; null: no virtual clock")
    mask_bytes: Count = Field(description="bytes of encoded masks")
    mask_floor_bytes: Count = Field(description="entropy of those masks, in bytes")
    protocol_bytes: Count = Field(description="what Flower's own counters show for the same messages")
    estimates: dict[Word, Count] = Field(description="published formula -> bytes it claims for the training messages")
    density: Density
    macs: Macs
    params: Count = Field(description="parameters of the model, buffers excluded")
    trainable_params: Count = Field(description="parameters that are trained and travel")
    disabled_features: dict[Word, Number] = Field(
        description="BatchNorm layer -> share of its channels with |gamma| below 0.01"
    )
    params_sha256: Word = Field(description="SHA-256 of the final parameters' bytes in schema order")
    wall_s: Number = Field(description="seconds that the run took")
    client_fits_per_s: Number = Field(description="trained clients a second, evaluation excluded")
    failures: dict[Word, Count] = Field(description="kind of failure -> client tasks that failed so")
    precision: Word = Field(description="number format of the computation")
    versions: dict[Word, Word] = Field(description="package -> version")

    @model_validator(mode="after")
    def _is_measured(self) -> Self:
        if self.metric is None and self.accuracy is None:
            raise ValueError("neither metric nor accuracy")
        return self

    @property
    def score(self) -> Score:
        """What the task is measured by."""
        if self.metric is not None:
            return self.metric
        assert self.accuracy is not None
        return Score(name="accuracy", higher=True, percent=True, **self.accuracy.model_dump())

    @property
    def failed(self) -> int:
        """Client tasks that failed, of every kind."""
        return sum(self.failures.values())


class Origin(_Strict):
    """The content of identity.json: hashes of the code of the user's parts, of the data, and of the test samples alone."""

    code: dict[Word, dict[Word, Word]]
    data: Word
    test: dict[Word, Word] = Field(default_factory=dict)


class Row(BaseModel):
    """A line of rounds.jsonl; its further columns are numbers."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[Word, float]
    round: int = Field(ge=-(2**53), le=2**53)
    uplink_bytes: float
    downlink_bytes: float


_ORIGIN = TypeAdapter(Origin)
_SUMMARY, _ROWS, _COUNTS = TypeAdapter(Summary), TypeAdapter(list[Row]), TypeAdapter(list[list[Count]])


def _valid(adapter: TypeAdapter[T], tree: object, folder: Path, file: str) -> T:
    try:
        return adapter.validate_python(tree, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))[:80]
        raise UserError(f"{folder}: damaged run folder: {file}: {key!r}: {first['msg']}") from error


def summary_of(tree: object, folder: Path) -> Summary:
    """The content of a summary.json as a `Summary`.

    Raises:
        UserError: it is none; names the first wrong key.
    """
    return _valid(_SUMMARY, tree, folder, "summary.json")


def origin_of(tree: object, folder: Path) -> Origin:
    """The content of an identity.json as an `Origin`.

    Raises:
        UserError: it is none.
    """
    return _valid(_ORIGIN, tree, folder, "identity.json")


def check_rows(rows: object, folder: Path, *, before: int = 0) -> None:
    """Refuse what are no lines of rounds.jsonl; `before` counts the lines before them.

    Raises:
        UserError: names the first wrong column.
    """
    _valid(_ROWS, rows, folder, f"rounds.jsonl after line {before}" if before else "rounds.jsonl")


def check_counts(counts: object, folder: Path) -> Sequence[Sequence[int]]:
    """The content of a partition.json: training samples by client (row) and class (column).

    Raises:
        UserError: no such table, or rows of different lengths.
    """
    table = _valid(_COUNTS, counts, folder, "partition.json")
    if len({len(row) for row in table}) > 1:
        raise UserError(f"{folder}: damaged run folder: partition.json: rows of different lengths")
    return table


def json_schema() -> str:
    """The JSON schema of summary.json, as docs/summary.schema.json holds it."""
    described = Summary.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **described}, indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
