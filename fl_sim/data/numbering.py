"""Classes and groups as numbers: whatever names them, in the order of their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.parquet import array_of
from fl_sim.core.types import UserError
from fl_sim.data.arrays import Array, Labels
from fl_sim.data.csv_file import as_it_looks
from fl_sim.data.table_columns import NOT_UTF8, is_text, plain, require_all, values

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Written:
    """A file's column of classes or groups.

    Attributes:
        path, name: the file, and the column.
        words: Arrow values, each once; bytes of a CSV file.
        codes: int32 (N,), which of them each row has.
        as_written: whether the words are bytes of a file that says nothing of their type.
    """

    path: Path
    name: str
    words: pa.Array
    codes: NDArray[np.int32]
    as_written: bool


def encoded(piece: pa.ChunkedArray, path: Path, name: str, *, as_written: bool) -> pa.Array:
    """A piece of a column as a dictionary. Raises UserError where values are missing or are no integers or names."""
    import pyarrow as pa

    column = piece if as_written else plain(piece)
    kind = column.type
    fits = as_written or is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind)
    if not fits:
        return values(column, path, name)  # raises, and says why
    if not as_written and pa.types.is_string_view(kind):
        column = column.cast(pa.large_string())
    if not pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    column = column.unify_dictionaries().combine_chunks()
    made = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    _require_names(made, path, name)
    return made


def _require_names(column: pa.DictionaryArray, path: Path, name: str) -> None:
    """Complain of rows without a value, or with an empty one."""
    import pyarrow as pa

    words = column.dictionary
    texts = is_text(words.type) or pa.types.is_binary(words.type)
    blank = np.array([texts and not word.strip() for word in words.to_pylist()] + [True], dtype=bool)
    if column.null_count or blank[:-1].any():
        require_all(blank[array_of(column.indices.fill_null(len(words)))], path, name)


def written(pieces: Sequence[pa.Array], path: Path, name: str, *, as_written: bool) -> Written:
    """All pieces of a file's column, in order."""
    import pyarrow as pa

    column = pa.chunked_array(pieces).unify_dictionaries()
    codes = np.concatenate([array_of(chunk.indices) for chunk in column.chunks])
    return Written(path, name, column.chunk(0).dictionary, codes.astype(np.int32, copy=False), as_written)


def numbered(columns: Sequence[Written], what: str) -> tuple[Array, list[Labels]]:
    """(the values, in their order: integers, or names where some are; the number of each row's, for each column).

    Args:
        columns: one or more files' columns of one thing.
        what: what the values are, for messages: "class" or "group".

    Raises:
        UserError: no integers or names, or two texts that are read as one number.
    """
    of_files = [column for column in columns if column.as_written]
    looks = _as_they_look(of_files, what) if of_files else {}
    found: list[Array] = []
    for column in columns:
        if column.as_written:
            found.append(np.array([looks[word] for word in column.words.to_pylist()]))
        else:
            found.append(values(_chunked(column.words), column.path, column.name))
    every = np.unique(np.concatenate(found))  # NumPy makes names of integers beside names
    ranks = [np.searchsorted(every, values.astype(every.dtype)) for values in found]
    return every, [rank.astype(np.int64)[column.codes] for rank, column in zip(ranks, columns, strict=True)]


def _chunked(words: pa.Array) -> pa.ChunkedArray:
    import pyarrow as pa

    return pa.chunked_array([words])


def _as_they_look(columns: Sequence[Written], what: str) -> dict[bytes, int | str]:
    """Words of CSV files -> what they are read as, by what all of them look like."""
    path, name = columns[0].path, columns[0].name
    words = list(dict.fromkeys(word for column in columns for word in column.words.to_pylist()))
    try:
        texts = [word.decode() for word in words]
    except UnicodeDecodeError:
        raise UserError(f"data.source: {path.name}: column {name!r} holds {NOT_UTF8}") from None
    read = values(as_it_looks(texts), path, name).tolist()
    first: dict[object, str] = {}
    for text, value in zip(texts, read, strict=True):
        other = first.setdefault(value, text)
        if other != text and not isinstance(value, str):
            raise UserError(
                f"data.source: column {name!r}: {other!r} and {text!r} would be one {what}; write it in one way"
            )
    return dict(zip(words, read, strict=True))
