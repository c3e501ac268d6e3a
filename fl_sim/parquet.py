"""Parquet files: written whole or not at all, and read although somebody else may have made them.

A file of kilobytes can declare thousands of millions of equal rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl_sim.files import open_plain, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

FREE_ROWS = 5_000_000
"""Any file may have as many."""


def read_table(path: Path, columns: Sequence[str] | None = None, *, rows_per_byte: int = 100) -> pa.Table:
    """Read one plain file; `rows_per_byte` bounds what rows without news may shrink to.

    Raises:
        OSError, ValueError: no plain file, no parquet, or more rows than a file of its size can have.
        pyarrow.ArrowException: damaged.
    """
    import pyarrow.parquet as pq

    # A stream: a path could also name a folder of parts or a remote file system.
    with open_plain(path) as stream:
        file = pq.ParquetFile(stream)
        size = os.fstat(stream.fileno()).st_size
        if (rows := file.metadata.num_rows) > FREE_ROWS + rows_per_byte * size:
            raise ValueError(f"{rows} rows in {size} bytes")
        return file.read(columns=None if columns is None else list(columns))


def encoded(table: pa.Table) -> bytes:
    """The bytes of a file that holds a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def write_table(table: pa.Table, path: Path) -> None:
    """Write one file. Raises OSError as `fl_sim.files.write_atomically` does."""
    write_atomically(path, encoded(table))
