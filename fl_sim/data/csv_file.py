"""CSV files: their columns as Arrow reads them, in one thread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fl_sim.core.files import open_plain

if TYPE_CHECKING:
    import pyarrow as pa


def read_csv(path: Path, columns: list[str] | None, types: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """The columns of a CSV file, of these types or as they look; or a reader that has the schema alone. Raises as pyarrow does."""
    from pyarrow import csv

    options = csv.ReadOptions(use_threads=False)
    # "" and NA are missing among names as among numbers; a name that is NA is written in quotes.
    convert = csv.ConvertOptions(
        include_columns=columns, column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    with open_plain(path) as stream:
        if columns is None:
            return csv.open_csv(stream, read_options=options)
        return csv.read_csv(stream, read_options=options, convert_options=convert)
