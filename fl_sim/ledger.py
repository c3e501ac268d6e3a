"""The ledger: every payload that moved, section by section. The only place where bytes are counted.

ledger.book(round=1, direction="down", phase="train", client=7, description=codecs.describe(data, ...), protocol_bytes=n)
ledger.total()                               # all payload bytes
ledger.total(by=("direction", "section"))    # {("down", "values"): ..., ...}
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl_sim.codecs import Description
from fl_sim.types import UserError

if TYPE_CHECKING:
    import pyarrow as pa

WORDS: Mapping[str, tuple[str, ...]] = {
    "direction": ("down", "up"),
    "phase": ("train", "evaluate", "query"),
    "section": ("values", "mask", "dense", "buffers", "auxiliary", "header"),
    "status": ("ok", "failed", "rejected", "late"),
}
CODES = {column: {word: code for code, word in enumerate(words)} for column, words in WORDS.items()}
TYPES: Mapping[str, str] = {
    "round": "i",
    "direction": "b",
    "phase": "b",
    "client": "i",
    "section": "b",
    "payload_bytes": "q",
    "nnz": "q",
    "dense_bytes": "q",
    "entropy_bytes": "d",
    "protocol_bytes": "q",
    "status": "b",
}
ARROW = {"i": "int32", "q": "int64", "d": "float64"}


class Ledger:
    """One row a message and section; columns are packed arrays, about 60 bytes a row.

    `payload_bytes` of a message's rows sum to `len(payload)`. `nnz` stands on the values row, `entropy_bytes` (the floor
    of the mask as it was coded) on the mask row, `protocol_bytes` (Flower's count for the whole message) on the header
    row, and `dense_bytes` (the same tensors sent complete) on each section's row. Every message has a header row.
    """

    def __init__(self) -> None:
        self._columns: dict[str, array[int] | array[float]] = {name: array(code) for name, code in TYPES.items()}
        self._totals: dict[str, int] = dict.fromkeys(WORDS["direction"], 0)

    def __len__(self) -> int:
        return len(self._columns["round"])

    def book(
        self,
        *,
        round: int,
        direction: str,
        phase: str,
        client: int,
        description: Description,
        protocol_bytes: int,
        status: str = "ok",
    ) -> None:
        """Book one message that moved."""
        common = (round, CODES["direction"][direction], CODES["phase"][phase], client)
        last = CODES["status"][status]
        for section, size in description.sections.items():
            row = (
                *common,
                CODES["section"][section],
                size,
                description.nnz if section == "values" else 0,
                description.dense_bytes.get(section, 0),
                description.entropy_bytes if section == "mask" else 0.0,
                protocol_bytes if section == "header" else 0,
                last,
            )
            for column, value in zip(self._columns.values(), row, strict=True):
                column.append(value)  # type: ignore[arg-type]
            self._totals[direction] += size

    @property
    def sent(self) -> Mapping[str, int]:
        """Payload bytes so far by direction; free to ask."""
        return self._totals

    def total(self, by: Sequence[str] = (), *, column: str = "payload_bytes") -> dict[tuple[str | int, ...], int]:
        """Sums of a column grouped by others; `{(): everything}` without groups.

        Raises:
            ValueError: a column that does not exist.
        """
        if unknown := {*by, column} - TYPES.keys():
            raise ValueError(f"no such ledger column: {', '.join(sorted(unknown))}; there are {', '.join(TYPES)}")
        keys = [self._words(name) for name in by]
        sums: dict[tuple[str | int, ...], int] = {} if by else {(): 0}
        for *key, value in zip(*keys, self._columns[column], strict=True):
            sums[tuple(key)] = sums.get(tuple(key), 0) + value
        return sums

    def messages(self, *, phase: str) -> dict[str, int]:
        """Messages of a phase by direction."""
        wanted, header = CODES["phase"][phase], CODES["section"]["header"]
        counts: dict[str, int] = {}
        for direction, kind, section in zip(
            *(self._columns[c] for c in ("direction", "phase", "section")), strict=True
        ):
            if kind == wanted and section == header:
                word = WORDS["direction"][int(direction)]
                counts[word] = counts.get(word, 0) + 1
        return counts

    def by_message(self, *, phase: str) -> Iterator[dict[str, dict[str, int | float | str]]]:
        """The messages of a phase in the order of booking, each as section -> row."""
        columns = {name: self._words(name) for name in TYPES}
        message: dict[str, dict[str, int | float | str]] = {}
        for i in range(len(self)):
            row = {name: values[i] for name, values in columns.items()}
            message[str(row["section"])] = row
            if row["section"] == "header":  # always a message's last row
                if row["phase"] == phase:
                    yield message
                message = {}

    def _words(self, name: str) -> list[str | int | float]:
        column = self._columns[name]
        return [WORDS[name][int(code)] for code in column] if name in WORDS else list(column)

    def to_table(self) -> pa.Table:
        """As an Arrow table, words instead of codes."""
        import numpy as np
        import pyarrow as pa

        arrays = []
        for name, code in TYPES.items():
            values = np.frombuffer(self._columns[name], dtype=code) if len(self) else np.zeros(0, dtype=code)
            if name in WORDS:
                arrays.append(pa.DictionaryArray.from_arrays(pa.array(values, pa.int8()), pa.array(WORDS[name])))
            else:
                arrays.append(pa.array(values, ARROW[code]))
        return pa.table(dict(zip(TYPES, arrays, strict=True)))

    def write(self, path: Path) -> None:
        """Write as parquet, atomically."""
        import pyarrow.parquet as pq

        beside = path.with_suffix(".tmp")
        pq.write_table(self.to_table(), beside, compression="zstd")
        os.replace(beside, path)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read what `write` wrote.

        Raises:
            UserError: no such file, or not a ledger.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # A plain file: a path could also name a folder of parts or a remote file system.
            with path.open("rb") as stream:
                table = pq.read_table(stream)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"ledger {path}: {str(error).splitlines()[0]}") from error
        if table.column_names != list(TYPES):
            raise UserError(f"ledger {path}: columns {table.column_names}; a ledger has {', '.join(TYPES)}")
        ledger = cls()
        for name, code in TYPES.items():
            values = table[name].to_pylist()
            try:
                ledger._columns[name] = array(code, [CODES[name][v] for v in values] if name in WORDS else values)
            except (KeyError, TypeError, OverflowError) as error:
                raise UserError(f"ledger {path}: column {name!r} holds {error}") from error
        for (direction,), size in ledger.total(by=("direction",)).items():
            ledger._totals[str(direction)] = size
        return ledger
