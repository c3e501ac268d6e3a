"""Rows of tables as arrays: pieces of files are taken as they come, inputs go to the cache's file and not through memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.types import UserError
from fl_sim.data.arrays import Array, too_close
from fl_sim.data.numbering import Written, encoded, written
from fl_sim.data.row_file import RowFile
from fl_sim.data.table_columns import as_numbers, numbers
from fl_sim.data.table_files import READERS, Asked, Pieces, named

if TYPE_CHECKING:
    import pyarrow as pa

COUNTING = 0.99
"""Share of the rows in which a number is one more than in the row before, from which a column counts them."""


@dataclass
class TableRows:
    """What some files hold beside their inputs.

    Attributes:
        count: rows.
        numbers: column -> its numbers, float32 (N,), of those that are no inputs.
        names: column of classes or groups -> what each file has of it.
        steps: input -> rows in which it is one more than in the row before.
    """

    count: int = 0
    numbers: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    names: dict[str, list[Written]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def add(self, other: TableRows) -> None:
        """Append the rows of a further file."""
        self.count += other.count
        for name, pieces in other.numbers.items():
            self.numbers.setdefault(name, []).extend(pieces)
        for name, files in other.names.items():
            self.names.setdefault(name, []).extend(files)
        for name, steps in other.steps.items():
            self.steps[name] = self.steps.get(name, 0) + steps

    def column(self, name: str) -> NDArray[np.float32]:
        """The numbers of a column that is no input."""
        return np.concatenate(self.numbers[name])

    @property
    def counting(self) -> list[str]:
        """Inputs that go up by one from row to row, as an index does; in each of several files from its start."""
        many = self.count > 2
        return [name for name, steps in self.steps.items() if many and steps > COUNTING * (self.count - 1)]


def read_rows(files: Sequence[Path], inputs: Sequence[str], asked: Asked, out: RowFile) -> TableRows:
    """Read the rows of all files, in order; their inputs are written to `out`.

    Args:
        files: of one part.
        inputs: columns that a model gets, among the numbers of `asked`.
        asked: all columns that are read.
        out: as wide as there are inputs.

    Raises:
        UserError: a file that cannot be read, or a column that holds something else than is needed.
        OSError: a file that cannot be read, or a disk that is full.
    """
    rows = TableRows()
    for path in files:
        rows.add(_file(path, inputs, asked, out, rows.count))
    if not rows.count:
        raise UserError(f"data.source: {files[0].name}: no rows")
    out.finish(rows.count)
    return rows


def _file(path: Path, inputs: Sequence[str], asked: Asked, out: RowFile, first: int) -> TableRows:
    """One file's rows. A column that is wrong in a piece is read whole: the line that says so counts all its rows."""
    import pyarrow as pa

    *others, last = READERS[path.suffix.lower()].ways
    for way in others:
        try:
            return _pieces(way(path, asked), _File(path, inputs, asked, out, first, whole=False))
        except UserError:
            break
        except (pa.ArrowException, ValueError):
            continue
    with named(path):
        return _pieces(last(path, asked), _File(path, inputs, asked, out, first, whole=True))


def _pieces(pieces: Pieces, file: _File) -> TableRows:
    for row, piece in pieces:
        file.add(row, piece)
    return file.rows()


class _File:
    """What has been read of a file."""

    def __init__(
        self, path: Path, inputs: Sequence[str], asked: Asked, out: RowFile, first: int, *, whole: bool
    ) -> None:
        self._path, self._asked, self._out, self._first = path, asked, out, first
        self._place = {name: at for at, name in enumerate(inputs)}
        self._as_written = READERS[path.suffix.lower()].as_written
        self._columns = {name: _Numbers(path, name, whole=whole) for name in asked.numbers}
        self._names: dict[str, list[pa.Array]] = {name: [] for name in asked.names}
        self._count = 0

    def add(self, row: int, piece: pa.Table) -> None:
        """Take a piece that begins at this row of the file."""
        self._count = max(self._count, row + len(piece))
        inputs: dict[int, NDArray[np.float32]] = {}
        for name in piece.column_names if len(piece) else ():
            if name in self._names:
                made = encoded(piece[name], self._path, name, as_written=self._as_written)
                self._names[name].append(made)
            if name in self._columns:
                read = self._columns[name].add(piece[name], keep=name not in self._place)
                inputs |= {self._place[name]: read} if name in self._place else {}
        if inputs:
            self._out.put(self._first + row, list(inputs), np.stack(list(inputs.values()), axis=1))

    def rows(self) -> TableRows:
        """All of the file. Raises UserError where float32 may not tell a column's numbers apart."""
        for column in self._columns.values():
            column.require_apart()
        kept = {name: column.kept for name, column in self._columns.items() if name not in self._place}
        names = {
            name: [written(pieces, self._path, name, as_written=self._as_written)] if pieces else []
            for name, pieces in self._names.items()
        }
        return TableRows(self._count, kept, names, {name: self._columns[name].steps for name in self._place})


class _Numbers:
    """A column of numbers, as its pieces come in order."""

    def __init__(self, path: Path, name: str, *, whole: bool) -> None:
        self._path, self._name, self._whole = path, name, whole
        self._ranges: list[tuple[Array, Array]] = []
        self._last: float | None = None
        self.steps = 0
        self.kept: list[NDArray[np.float32]] = []

    def add(self, piece: pa.ChunkedArray, *, keep: bool) -> NDArray[np.float32]:
        """float32 numbers of the next piece. Raises UserError."""
        if self._whole:
            read = numbers(piece, self._path, self._name)
        else:
            given, read = as_numbers(piece, self._path, self._name)
            self._ranges.append((given.min(), given.max()))
        rises = np.diff(read) == 1
        self.steps += int(rises.sum()) + int(self._last is not None and read[0] - self._last == 1)
        self._last = read[-1]
        if keep:
            self.kept.append(read)
        return read

    def require_apart(self) -> None:
        """Raise UserError where the column must be seen whole to know whether float32 tells its numbers apart."""
        if self._ranges:
            low, high = (np.array(ends) for ends in zip(*self._ranges, strict=True))
            if too_close(low.min(), high.max()).any():
                raise UserError(f"data.source: {self._path.name}: column {self._name!r}: numbers far from 0")
