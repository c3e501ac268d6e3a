"""CSV files: their columns as Arrow reads them, in one thread."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl_sim.core.files import open_plain

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv


BLOCK = 1 << 20
"""Bytes of a block; its rows are read at once."""


def read_csv(path: Path, columns: list[str] | None, as_written: Sequence[str] = ()) -> pa.Table:
    """The columns of a CSV file as they look, or bytes as they are written; or a reader that has the schema alone. Raises as
    pyarrow does."""
    from pyarrow import csv

    options = csv.ReadOptions(use_threads=False)
    with open_plain(path) as stream:
        if columns is None:
            return csv.open_csv(stream, read_options=options)
        return csv.read_csv(stream, read_options=options, convert_options=_convert(columns, as_written))


def csv_blocks(path: Path, columns: list[str], as_written: Sequence[str], *, wide: bool) -> Iterator[pa.Table]:
    """Read as `read_csv` does, but a block of rows at a time, by the types that the first block has.

    Args:
        path: the file.
        columns: columns that are read.
        as_written: those of them that are bytes, in a dictionary.
        wide: integers of the first block are read as float64.

    Raises:
        pyarrow.ArrowException: damaged, or a value that is not of the first block's type.
    """
    import pyarrow as pa
    from pyarrow import csv

    options = csv.ReadOptions(use_threads=False, block_size=BLOCK)
    convert = _convert(columns, as_written)
    if wide:
        with open_plain(path) as stream:
            first = csv.open_csv(stream, read_options=options, convert_options=convert).schema
        wider = {field.name: pa.float64() for field in first if pa.types.is_integer(field.type)}
        convert.column_types = {**wider, **{field.name: field.type for field in first if field.name not in wider}}
    with open_plain(path) as stream:
        for block in csv.open_csv(stream, read_options=options, convert_options=convert):
            yield pa.Table.from_batches([block])


def as_it_looks(words: Sequence[str]) -> pa.ChunkedArray:
    """Texts, none of which is empty, as the values that a CSV column of them is read as."""
    from pyarrow import csv

    lines = "".join('"' + word.replace('"', '""') + '"\n' for word in words)
    read = csv.ReadOptions(use_threads=False, column_names=["words"])
    parse = csv.ParseOptions(newlines_in_values=True)
    table = csv.read_csv(
        io.BytesIO(lines.encode()), read_options=read, parse_options=parse, convert_options=_convert(["words"], ())
    )
    return table["words"]


def _convert(columns: list[str], as_written: Sequence[str]) -> csv.ConvertOptions:
    import pyarrow as pa
    from pyarrow import csv

    # "" and NA are missing among names as among numbers; a name that is NA is written in quotes.
    return csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(as_written, pa.dictionary(pa.int32(), pa.binary())),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
