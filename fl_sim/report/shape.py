"""What the files of a run folder must look like before anything of them is shown: the folder may be from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds control characters")  # a terminal would obey them
    return text


Word = Annotated[str, StringConstraints(max_length=400), AfterValidator(_printable)]

Level = Annotated[str, StringConstraints(pattern=r"^[01]\.\d{1,6}$")]


class _Summary(BaseModel):
    """The parts of `summary.json` that are shown as they are; numbers are asked for one by one (`Report.number`)."""

    model_config = ConfigDict(strict=True)
    name: Word
    id: Word
    seed: int
    engine: Word
    rounds: int
    precision: Word
    estimates: dict[Word, float]
    num_clients: int = 0
    params: int = 0
    wall_s: float = 0.0
    failures: dict[Word, int] = {}
    versions: dict[Word, Word] = {}
    disabled_features: dict[Word, float] = {}
    bytes_to_accuracy: dict[Level, float | None] = {}
    time_to_accuracy: dict[Level, float | None] = {}


class _Row(BaseModel):
    """A line of rounds.jsonl; its further columns are numbers."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[Word, float]
    round: int
    uplink_bytes: float
    downlink_bytes: float


_ROWS = TypeAdapter(list[_Row])
_COUNTS = TypeAdapter(list[list[int]], config=ConfigDict(strict=True))


def _said(file: str, check: Callable[[], object]) -> str:
    try:
        check()
    except ValidationError as error:
        first = error.errors()[0]
        return f"{file}: {'.'.join(map(str, first['loc']))[:80]!r}: {first['msg']}"
    return ""


def wrong(summary: object, rows: object) -> str:
    """What is wrong with a summary and its rounds, in one line; empty where nothing is."""
    return _said("summary.json", lambda: _Summary.model_validate(summary)) or _said(
        "rounds.jsonl", lambda: _ROWS.validate_python(rows)
    )


def wrong_counts(counts: object) -> str:
    """The same for partition.json: as many classes for each client."""
    said = _said("partition.json", lambda: _COUNTS.validate_python(counts))
    if not said and isinstance(counts, list) and len({len(row) for row in counts}) > 1:
        return "partition.json: rows of different lengths"
    return said
