"""Parquet files: written whole or not at all, and read although somebody else may have made them.

A file of kilobytes can declare thousands of millions of equal rows, or one large value in each of a million.
Arrow's threads give back what they read after the table is there; where that meets the end of the program, the process
aborts. So none of them read here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.files import open_plain, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FREE_ROWS = 5_000_000
"""Any file may have as many."""
FREE_BYTES = 500_000_000
"""Any file may expand to as much."""
BATCH = 1 << 17
"""Rows that are read at a time, where nobody says another number."""
VARIABLE = "BYTE_ARRAY"
READ = ("BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE", VARIABLE)
"""Physical types of what is read here: at most 8 bytes a value, or of a length that is summed before it is read."""


def read_schema(path: Path) -> pa.Schema:
    """Names and types of one plain file's columns, and its remarks on them. Raises as `read_table` does."""
    import pyarrow.parquet as pq

    with open_plain(path) as stream:
        return pq.ParquetFile(stream, pre_buffer=False).schema_arrow


def release_unused() -> None:
    """Give the memory that Arrow keeps for its next table back to the system."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def read_table(
    path: Path,
    columns: Sequence[str],
    *,
    free_rows: int | None = None,
    rows_per_byte: float = 100,
    bytes_per_byte: int = 1000,
) -> pa.Table:
    """Read those of the columns that one plain file has.

    Args:
        path: the file.
        columns: names; those that the file lacks are left out.
        free_rows: rows that any file may have; None = `FREE_ROWS`.
        rows_per_byte: further rows for each byte of the file: what rows without news may shrink to.
        bytes_per_byte: bytes that each byte of the file may become beyond `FREE_BYTES`: what equal values may shrink to.

    Raises:
        OSError, ValueError: no plain file, no parquet, a column of lists, or more than a file of its size can hold.
        pyarrow.ArrowException: damaged.
    """
    with _checked(path, columns, FREE_ROWS if free_rows is None else free_rows, rows_per_byte, bytes_per_byte) as file:
        return file.read(columns=list(columns), use_threads=False)


def read_batches(path: Path, columns: Sequence[str], rows: int | None = None) -> Iterator[pa.Table]:
    """Read as `read_table` does, but so many rows at a time; None = `BATCH`."""
    import pyarrow as pa

    with _checked(path, columns, FREE_ROWS, 100, 1000) as file:
        for batch in file.iter_batches(rows or BATCH, columns=list(columns), use_threads=False):
            yield pa.Table.from_batches([batch])


@contextmanager
def _checked(
    path: Path, columns: Sequence[str], free_rows: int, rows_per_byte: float, bytes_per_byte: int
) -> Iterator[pq.ParquetFile]:
    """Open a file that holds no more than a file of its size can."""
    import pyarrow.parquet as pq

    # A stream: a path could also name a folder of parts or a remote file system.
    with open_plain(path) as stream:
        file, size = pq.ParquetFile(stream, pre_buffer=False), os.fstat(stream.fileno()).st_size
        allowed = int(free_rows + rows_per_byte * size)
        if (rows := file.metadata.num_rows) > allowed:
            raise ValueError(f"{rows} rows in {size} bytes; allowed: {allowed}")
        leaves, most = _leaves(file, columns), FREE_BYTES + bytes_per_byte * size
        for measure in (partial(_page_bytes, file), partial(_string_bytes, stream, leaves)):
            if (expanded := measure()) > most:
                raise ValueError(f"{size} bytes that expand to {expanded}; allowed: {most}")
        yield file


def _leaves(file: pq.ParquetFile, columns: Sequence[str]) -> Mapping[int, str]:
    """Number -> physical type of what lies under the columns."""
    every = {number: file.schema.column(number) for number in range(len(file.schema))}
    leaves = {number: leaf for number, leaf in every.items() if leaf.path.split(".")[0] in columns}
    for leaf in leaves.values():
        if leaf.max_repetition_level:
            raise ValueError(f"column {leaf.path.split('.')[0]!r} holds lists; needed: one value in each row")
        if leaf.physical_type not in READ:
            raise ValueError(f"column {leaf.path!r} holds {leaf.physical_type}; allowed: {', '.join(sorted(READ))}")
    return {number: leaf.physical_type for number, leaf in leaves.items()}


def _page_bytes(file: pq.ParquetFile) -> int:
    """Bytes of all columns' pages once they are decompressed, as the file says."""
    # Of the row groups, not of their columns: pyarrow ends the process where a column's own metadata contradict themselves.
    metadata = file.metadata
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))


def _string_bytes(stream: BinaryIO, leaves: Mapping[int, str]) -> int:
    """Bytes of strings once every row has its own; here they are held once for all rows that have them."""
    import pyarrow.parquet as pq

    schema = pq.ParquetFile(stream).schema
    paths = [schema.column(number).path for number, kind in leaves.items() if kind == VARIABLE]
    file = pq.ParquetFile(stream, read_dictionary=paths, pre_buffer=False)
    # By row group: pyarrow cannot put the dictionaries of several together where they lie in a struct, as images do.
    groups = range(file.metadata.num_row_groups)
    columns = (
        file.read_row_group(number, columns=[path], use_threads=False).column(0) for number in groups for path in paths
    )
    return sum(_repeated(chunk) for column in columns for chunk in column.chunks)


def _repeated(strings: pa.Array) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_struct(strings.type):
        (strings,) = strings.flatten()
    if not pa.types.is_dictionary(strings.type):  # of a width, as decimals have
        return int(strings.nbytes)
    lengths = array_of(pc.binary_length(strings.dictionary))
    times = np.bincount(array_of(strings.indices.drop_null()), minlength=len(lengths))
    return int((lengths.astype(np.int64) * times).sum())


def array_of(column: pa.Array | pa.ChunkedArray) -> NDArray[np.number | np.bool_]:
    """A NumPy array, read-only, of a numeric Arrow column without missing values; pandas stays away as in `numbers_of`.

    Raises:
        pyarrow.ArrowException: there are missing values, or the column is not numeric.
    """
    import pyarrow as pa

    return np.from_dlpack(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)


def numbers_of(values: NDArray[np.number]) -> pa.Array:
    """An Arrow array over a contiguous 1-D array's own memory. `pa.array` would import pandas wherever it is installed, which
    takes longer than the first rounds of a small run."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def words_of(codes: NDArray[np.number], words: Sequence[str]) -> pa.DictionaryArray:
    """An Arrow dictionary array of `words[code]`, codes being integers; pandas stays away as in `numbers_of`."""
    import pyarrow as pa

    parts = [word.encode() for word in words]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    dictionary = pa.StringArray.from_buffers(len(parts), pa.py_buffer(ends), pa.py_buffer(b"".join(parts)))
    return pa.DictionaryArray.from_arrays(numbers_of(codes), dictionary)


def encoded(table: pa.Table) -> bytes:
    """The bytes of a file that holds a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def write_table(table: pa.Table, path: Path) -> None:
    """Write one file. Raises OSError as `fl_sim.core.files.write_atomically` does."""
    write_atomically(path, encoded(table))
