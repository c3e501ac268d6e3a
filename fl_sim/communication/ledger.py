"""The ledger: every payload that moved, section by section. The only place where bytes are counted.

ledger.book(round=1, direction="down", phase="train", client=7, description=codecs.describe(data, ...), protocol_bytes=n)
ledger.total()                                                            # {(): all payload bytes}
ledger.total(by=("direction", "section"), where={"phase": "train"})       # {("down", "values"): ..., ...}
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, BinaryIO, cast
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs import Description
from fl_sim.codecs.sections import BOOKED, CODEC, is_extra
from fl_sim.core.parquet import array_of, numbers_of, read_batches, read_schema, words_of, write_table
from fl_sim.core.types import UserError

if TYPE_CHECKING:
    import pyarrow as pa

WORDS: Mapping[str, tuple[str, ...]] = {
    "direction": ("down", "up"),
    # The last three are those of foreign Flower apps: legacy messages, and any other type.
    "phase": ("train", "evaluate", "query", "get_parameters", "get_properties", "other"),
    # "config" and "metrics" as well: records of scalars, as Flower serialises them. Sections of extra tensors come after
    # these, in the order in which a ledger meets them (`Ledger.words`).
    "section": (*BOOKED, "config", "metrics", CODEC),
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
OWNERS: Mapping[str, str] = {"nnz": "values", "entropy_bytes": "mask", "protocol_bytes": "header"}
"""Columns that stand on one section's rows only, and are 0 on the others: they share the field `own` of a row."""
ARROW = {"i": "int32", "q": "int64", "d": "float64"}
FIELDS = ("round", "client", "direction", "phase", "section", "status", "payload_bytes", "dense_bytes")
ROW = np.dtype([*((name, f"<{TYPES[name]}") for name in FIELDS), ("own", "<q")])
_PLAIN = "".join(TYPES[name] for name in FIELDS)
BLOCK = 1 << 16
"""Rows that are read at a time."""
MEMORY = 1 << 26
"""Bytes of rows that a ledger of a file keeps in memory."""
MOST_SECTIONS = 64
"""Sections of one ledger."""

Column = NDArray[np.int8] | NDArray[np.int32] | NDArray[np.int64] | NDArray[np.float64]
Key = tuple[str | int | float, ...]


class Ledger:
    """Ledger: one row for each message and section, 36 bytes each, in the file `rows`; None keeps them in memory.

    `payload_bytes` of a message's rows sum to `len(payload)`. `nnz` stands on the values row, `entropy_bytes` (the floor
    of the mask as it was coded) on the mask row, `protocol_bytes` (Flower's count for the whole message) on the header
    row, and `dense_bytes` (the same tensors sent complete) on each section's row. Every message has a header row, its
    last.

    Attributes:
        words: of each column of words, the words by their code; sections of extra tensors follow those of `WORDS`.
    """

    def __init__(self, rows: BinaryIO | None = None, *, block: int = BLOCK) -> None:
        self._block = block
        self._sections = list(WORDS["section"])
        self._codes = dict(CODES["section"])
        self._rows: BinaryIO = io.BytesIO() if rows is None else rows
        self._count = 0
        self._totals: dict[str, int] = dict.fromkeys(WORDS["direction"], 0)

    def __len__(self) -> int:
        return self._count

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
        """Book one message that moved. Raises OSError where the rows' file cannot grow."""
        way, kind, outcome = CODES["direction"][direction], CODES["phase"][phase], CODES["status"][status]
        own = {"values": description.nnz, "mask": description.entropy_bytes, "header": protocol_bytes}
        sections, dense = description.sections, description.dense_bytes
        names, packed = _layout_of(tuple(sections))
        fields: list[int | float] = []
        for section in names:
            number = self._codes.get(section)
            if number is None:
                number = self._code("section", section, new=True)
            size = sections.get(section, 0)
            fields += (round, client, way, kind, number, outcome, size, dense.get(section, 0), own.get(section, 0))
        self._rows.write(packed.pack(*fields))
        self._count += len(names)
        self._totals[direction] += sum(sections.values())

    def cut(self, count: int) -> None:
        """Keep the first `count` rows only: those of a round that was undone were never booked."""
        for (way,), size in self.total(by=("direction",), start=count).items():
            self._totals[str(way)] -= size
        self._rows.seek(count * ROW.itemsize)
        self._rows.truncate()
        self._count = min(count, self._count)

    @property
    def words(self) -> Mapping[str, Sequence[str]]:
        """See the class."""
        return {**WORDS, "section": self._sections}

    def _code(self, name: str, value: str | int, *, new: bool = False) -> int:
        """The code of a word, or the number itself; with `new`, a section of extra tensors gets one at first sight."""
        _known(name)
        if name != "section" or value in CODES["section"]:
            return _code(name, value)
        if value not in self._codes:
            if not (new and is_extra(str(value)) and len(self._sections) < MOST_SECTIONS):
                raise ValueError(f"no such section: {str(value)[:40]!r}; there are {', '.join(self._sections)}")
            self._codes[str(value)] = len(self._sections)
            self._sections.append(str(value))
        return self._codes[str(value)]

    def _words(self, name: str, codes: NDArray[np.generic]) -> list[str | int | float]:
        words = self.words
        return [words[name][code] for code in codes.tolist()] if name in words else codes.tolist()

    @property
    def sent(self) -> Mapping[str, int]:
        """Payload bytes so far by direction; free to ask."""
        return self._totals

    def blocks(self, start: int = 0) -> Iterator[NDArray[np.void]]:
        """The rows from `start` on, in pieces: arrays with the fields `FIELDS`, words as their index in `words`."""
        for first in range(start, self._count, self._block):
            self._rows.seek(first * ROW.itemsize)
            data = self._rows.read(min(self._block, self._count - first) * ROW.itemsize)
            self._rows.seek(0, io.SEEK_END)
            yield np.frombuffer(data, ROW)

    def column(self, name: str, *, start: int = 0) -> Column:
        """A copy of one column from row `start` on, in the order of booking; words as their index in `words[name]` (int8).

        Raises:
            ValueError: a column that does not exist.
        """
        _known(name)
        return np.concatenate([np.zeros(0, TYPES[name]), *(_part(block, name) for block in self.blocks(start))])

    def total(
        self,
        by: Sequence[str] = (),
        *,
        column: str = "payload_bytes",
        where: Mapping[str, str | int] | None = None,
        start: int = 0,
    ) -> dict[Key, int]:
        """Sums of a column grouped by others; `{(): everything}` without groups. `where` keeps the rows that match.

        Rows before `start` do not count.

        Raises:
            ValueError: a column, or a word of one, that does not exist.
        """
        _known(*by, column)
        wanted = {name: self._code(name, value) for name, value in (where or {}).items()}
        kept = (block[_matching(block, wanted)] for block in self.blocks(start))
        if not by:
            parts = [np.zeros(0, TYPES[column]), *(_part(block, column) for block in kept)]
            return {(): np.concatenate(parts).sum().item()}
        slots: dict[Key, int] = {}
        sums = np.zeros(0, TYPES[column])
        for block in kept:
            keys, place = _grouped([_part(block, name) for name in by])
            slot = np.array([slots.setdefault(key, len(slots)) for key in keys], np.int64)
            sums = np.append(sums, np.zeros(len(slots) - len(sums), sums.dtype))
            np.add.at(sums, slot[place], _part(block, column))  # not bincount: sums of bytes stay integers
        words = self.words
        named = [tuple(words[n][int(c)] if n in words else c for n, c in zip(by, key, strict=True)) for key in slots]
        return {name: sum_ for _, name, sum_ in sorted(zip(slots, named, sums.tolist(), strict=True))}

    def messages(self, *, phase: str, clients: Sequence[int] | None = None, start: int = 0) -> dict[str, int]:
        """Messages of a phase by direction, of these clients (None = of all), booked from row `start` on."""
        headers = self.column("section", start=start) == CODES["section"]["header"]
        found = headers & (self.column("phase", start=start) == _code("phase", phase))
        if clients is not None:
            found &= np.isin(self.column("client", start=start), list(clients))
        counts = np.bincount(self.column("direction", start=start)[found], minlength=2)
        return {word: count for word, count in zip(WORDS["direction"], counts.tolist(), strict=True) if count}

    def by_message(self, *, phase: str) -> Iterator[dict[str, dict[str, int | float | str]]]:
        """The messages of a phase in the order of booking, each as section -> row."""
        columns = {name: self.column(name) for name in TYPES}
        ends = np.flatnonzero(columns["section"] == CODES["section"]["header"]) + 1  # always a message's last row
        wanted = columns["phase"][ends - 1] == _code("phase", phase)
        for start, end in zip(np.append(0, ends)[:-1][wanted].tolist(), ends[wanted].tolist(), strict=True):
            rows = zip(*(self._words(name, column[start:end]) for name, column in columns.items()), strict=True)
            yield {str(row["section"]): row for row in (dict(zip(TYPES, values, strict=True)) for values in rows)}

    def to_table(self, *, start: int = 0) -> pa.Table:
        """Convert to an Arrow table with words instead of codes, from row `start` on."""
        import pyarrow as pa

        columns = {name: self.column(name, start=start) for name in TYPES}
        words = self.words
        arrays = [words_of(values, words[n]) if n in WORDS else numbers_of(values) for n, values in columns.items()]
        return pa.Table.from_arrays(arrays, list(columns))

    def write(self, path: Path, *, start: int = 0) -> None:
        """Write as parquet, atomically; from row `start` on, so that parts can be written as a run goes."""
        write_table(self.to_table(start=start), path)

    @classmethod
    def read(cls, *paths: Path) -> Ledger:
        """Read what `write` wrote, parts in the order given; more than `MEMORY` bytes of rows lie in a temporary file.

        Raises:
            UserError: no such file, or not a ledger.
        """
        rows = SpooledTemporaryFile(MEMORY)  # noqa: SIM115, it goes with the ledger
        ledger = cls(cast(BinaryIO, rows))
        finalize(ledger, rows.close)
        for path in paths:
            ledger.extend(path)
        return ledger

    def extend(self, path: Path) -> None:
        """Append the rows of a file that `write` wrote.

        Raises:
            UserError: no such file, or not a ledger; nothing was appended.
        """
        count, totals = self._count, dict(self._totals)
        try:
            for table in _tables(path):
                rows = self._rows_of(table, path)
                self._rows.write(rows.tobytes())
                count += len(rows)
                for word, number in CODES["direction"].items():
                    totals[word] += int(rows["payload_bytes"][rows["direction"] == number].sum())
        except UserError:
            self._rows.seek(self._count * ROW.itemsize)
            self._rows.truncate()
            raise
        self._count, self._totals = count, totals

    def _rows_of(self, table: pa.Table, path: Path) -> NDArray[np.void]:
        section = self._from_arrow(table, "section", path)
        rows = np.zeros(len(section), ROW)
        for name in TYPES:
            values = self._from_arrow(table, name, path)
            if name in OWNERS:
                owners = section == CODES["section"][OWNERS[name]]
                rows["own"].view(values.dtype)[owners] = values[owners]
            else:
                rows[name] = values
        return rows

    def _from_arrow(self, table: pa.Table, name: str, path: Path) -> Column:
        """Read one column as codes or numbers."""
        import pyarrow as pa

        column = table[name]
        try:
            if column.null_count:
                raise ValueError("missing values")
            if name not in WORDS:
                return np.array(array_of(column.cast(ARROW[TYPES[name]])), dtype=TYPES[name])
            words = pa.dictionary(pa.int32(), pa.string())
            encoded = (
                column.cast(words) if pa.types.is_dictionary(column.type) else column.cast("string").dictionary_encode()
            )
            return np.concatenate([np.zeros(0, np.int8), *(self._coded(name, chunk) for chunk in encoded.chunks)])
        except (ValueError, pa.ArrowException) as error:
            raise UserError(f"ledger {path}: column {name!r} holds {error}") from error

    def _coded(self, name: str, words: pa.DictionaryArray) -> NDArray[np.int8]:
        codes = [self._code(name, word, new=True) for word in words.dictionary.to_pylist()]
        return np.asarray(np.array(codes, np.int8)[array_of(words.indices)], np.int8)


def _matching(rows: NDArray[np.void], wanted: Mapping[str, int]) -> NDArray[np.bool_]:
    """The rows of a block whose columns have these codes."""
    keep = np.ones(len(rows), np.bool_)
    for name, code in wanted.items():
        keep &= _part(rows, name) == code
    return keep


def _grouped(columns: Sequence[Column]) -> tuple[list[Key], NDArray[np.int64]]:
    """(distinct rows of some columns, the place among them of each row)."""
    group = np.zeros(len(columns[0]), dtype=np.int64)
    parts: list[NDArray[np.generic]] = []
    for values in columns:
        part, place = np.unique(values, return_inverse=True)
        parts.append(part)
        group = group * len(part) + place
    groups, place = np.unique(group, return_inverse=True)
    places = np.unravel_index(groups, [len(part) for part in parts]) if len(groups) else [groups] * len(parts)
    return list(zip(*(part[p].tolist() for part, p in zip(parts, places, strict=True)), strict=True)), place


@lru_cache(maxsize=256)
def _layout_of(sections: tuple[str, ...]) -> tuple[tuple[str, ...], struct.Struct]:
    """A message's sections in the order of their rows, the header last, and how these rows are packed."""
    names = (*(name for name in sections if name != "header"), "header")
    return names, struct.Struct("<" + "".join(_PLAIN + ("d" if name == "mask" else "q") for name in names))


def _part(rows: NDArray[np.void], name: str) -> Column:
    """Read one column of a block of rows."""
    if name not in OWNERS:
        return rows[name]
    own = rows["own"].view(TYPES[name])
    return np.where(rows["section"] == CODES["section"][OWNERS[name]], own, own.dtype.type(0))


def _known(*names: str) -> None:
    if unknown := set(names) - TYPES.keys():
        raise ValueError(f"no such ledger column: {', '.join(sorted(unknown))}; there are {', '.join(TYPES)}")


def _code(name: str, value: str | int) -> int:
    _known(name)
    if name not in WORDS:
        return int(value)
    if value not in WORDS[name]:
        raise ValueError(f"no such {name}: {value!r}; there are {', '.join(WORDS[name])}")
    return CODES[name][str(value)]


def _tables(path: Path) -> Iterator[pa.Table]:
    """The file's rows, some at a time."""
    import pyarrow as pa

    try:
        names = [name for name in read_schema(path).names if name in TYPES]
        if names != list(TYPES):
            raise UserError(f"ledger {path}: of its columns only {names}; a ledger has {', '.join(TYPES)}")
        yield from read_batches(path, list(TYPES))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"ledger {path}: {str(error).splitlines()[0]}") from error
