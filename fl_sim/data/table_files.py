"""Files of tables, read piece by piece; and whole where a piece does not show what is wrong with a column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_sim.core.errors import in_one_line
from fl_sim.core.parquet import read_batches, read_schema, read_table
from fl_sim.core.types import UserError
from fl_sim.data.csv_file import csv_blocks, read_csv
from fl_sim.data.table_columns import NOT_UTF8

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Asked:
    """Columns of a file that are read.

    Attributes:
        numbers: columns of numbers.
        names: columns of classes or groups, which are integers or names: a CSV file's stay as they are written.
    """

    numbers: Sequence[str]
    names: Sequence[str]

    @property
    def every(self) -> list[str]:
        """All columns, each once."""
        return list(dict.fromkeys([*self.numbers, *self.names]))


Pieces = Iterator[tuple[int, "pa.Table"]]
"""(the first row of a piece, the piece): some columns in some rows; all columns and rows once, in any order."""
Way = Callable[[Path, Asked], Pieces]
TOGETHER = 4
"""Columns of a parquet file that are read at once."""


@dataclass(frozen=True)
class Reader:
    """Reader of one file format.

    Attributes:
        names: the file's columns.
        ways: of reading it, those that hold less of it first; the last one gives whole columns.
        as_written: whether `Asked.names` come as the file has them, before anybody says whether they are integers.
    """

    names: Callable[[Path], list[str]]
    ways: Sequence[Way]
    as_written: bool = False


def _some_columns(path: Path, asked: Asked) -> Pieces:
    """Few columns at a time: the pages of all columns at once would be larger than the table."""
    for start in range(0, len(asked.every), TOGETHER):
        row = 0
        for piece in read_batches(path, asked.every[start : start + TOGETHER]):
            yield row, piece
            row += len(piece)


def _columns(path: Path, asked: Asked) -> Pieces:
    for name in asked.every:
        yield 0, read_table(path, [name])


def _blocks(path: Path, asked: Asked, *, wide: bool = False) -> Pieces:
    row = 0
    for block in csv_blocks(path, asked.every, asked.names, wide=wide):
        yield row, block
        row += len(block)


def _wide_blocks(path: Path, asked: Asked) -> Pieces:
    """Columns that begin with integers may go on with fractions."""
    return _blocks(path, asked, wide=True)


def _csv_table(path: Path, asked: Asked) -> Pieces:
    yield 0, read_csv(path, asked.every, asked.names)


READERS: Mapping[str, Reader] = {
    ".csv": Reader(
        lambda path: list(read_csv(path, None).schema.names), (_blocks, _wide_blocks, _csv_table), as_written=True
    ),
    ".parquet": Reader(lambda path: list(read_schema(path).names), (_some_columns, _columns)),
}
"""Suffix -> what reads files of it."""


def column_names(path: Path) -> list[str]:
    """Names of a file's columns. Raises UserError, or OSError."""
    with named(path):
        return READERS[path.suffix.lower()].names(path)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of reading one file as a line that names it."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"data.source: {path.name} holds {NOT_UTF8}") from error
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"data.source: {path.name}: unreadable table: {in_one_line(error)}") from error
