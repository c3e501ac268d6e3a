"""Columns of tables and frames as arrays: numbers, truth values, or integers and names; or one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.parquet import array_of
from fl_sim.core.types import UserError
from fl_sim.data.arrays import Array, Labels, check_rounding

if TYPE_CHECKING:
    import pyarrow as pa

FRAME = "the frame"
"""What messages call a data frame, which has no file."""


def _of(path: Path) -> str:
    return f"data: {FRAME}" if path.name == FRAME else f"data.source: {path.name}"


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is text, in any of its three layouts."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


NOT_UTF8 = "text that is not UTF-8; save the file in that encoding"


def shown_type(kind: pa.DataType) -> str:
    """A column's type for a reader: Arrow calls text of another encoding binary."""
    import pyarrow as pa

    return NOT_UTF8 if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else str(kind)


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column, a dictionary's as its values."""
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def require_all(missing: NDArray[np.bool_], path: Path, name: str) -> None:
    """Complain of missing values, where some are. Raises UserError."""
    if missing.any():
        raise UserError(
            f"{_of(path)}: column {name!r}: {missing.sum()} values are missing, the first in row {missing.argmax()} (from 0); "
            "fill them in, or leave the rows out"
        )


def _there(column: pa.ChunkedArray, path: Path, name: str) -> pa.ChunkedArray:
    """The column. Raises UserError where values are missing: no value, or an empty name."""
    column = plain(column)
    if is_text(column.type):
        blank = [value is None or not value.strip() for value in column.to_pylist()]
        require_all(np.array(blank, dtype=bool), path, name)
    elif column.null_count:
        require_all(column.is_null().to_numpy(), path, name)
    return column


def as_numbers(column: pa.ChunkedArray, path: Path, name: str) -> tuple[Array, NDArray[np.float32]]:
    """(the numbers as they are, the same in float32), (N,) each; whether float32 tells them apart is not looked at.

    Raises:
        UserError: values that are missing, infinite or no numbers.
    """
    import pyarrow as pa

    column = _there(column, path, name)
    where, kind = f"{_of(path)}: column {name!r}", column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"{where} holds {_told(column)}; needed: numbers, in every row")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
        given = column.to_numpy() if pa.types.is_boolean(kind) else array_of(column)
        numbers: NDArray[np.float32] = given.astype(np.float32)
    if not (finite := np.isfinite(numbers)).all():
        row = int((~finite).argmax())
        raise UserError(
            f"{where} holds NaN or infinity, first in row {row} (from 0); needed: finite numbers of float32"
        )
    return given, numbers


def numbers(column: pa.ChunkedArray, path: Path, name: str) -> NDArray[np.float32]:
    """float32 numbers of a whole column. Raises UserError as `as_numbers`, and where float32 does not tell them apart."""
    given, numbers = as_numbers(column, path, name)
    check_rounding(f"{_of(path)}: column {name!r}: its values", given, numbers)
    return numbers


def _told(column: pa.ChunkedArray) -> str:
    """The type of a column that is not what it should be; of text, the first value that is no number."""
    if not is_text(column.type):
        return shown_type(column.type)
    for row, value in enumerate(column.to_pylist()):
        try:
            float(value)
        except ValueError:
            return f"text, for instance {value[:40]!r} in row {row} (from 0)"
    return "text"


def values(column: pa.ChunkedArray, path: Path, name: str) -> NDArray[np.generic]:
    """Integers or names, one a row: classes or groups."""
    import pyarrow as pa

    column = _there(column, path, name)
    if pa.types.is_boolean(column.type) or pa.types.is_integer(column.type):
        given = column.to_numpy() if pa.types.is_boolean(column.type) else array_of(column)
        if given.dtype == np.uint64 and len(given) and given.max() > np.iinfo(np.int64).max:
            raise UserError(f"data.source: {path.name}: column {name!r} holds {given.max()}; needed: integers of int64")
        integers: Labels = given.astype(np.int64)
        return integers
    if is_text(column.type):
        return np.array(column.to_pylist(), dtype=str)
    raise UserError(f"{_of(path)}: column {name!r} holds {shown_type(column.type)}; needed: integers or names")


def truths(found: NDArray[np.float32], path: Path, name: str) -> NDArray[np.bool_]:
    """Numbers 0 and 1 as truth values. Raises UserError where there are others."""
    if wrong := [float(value) for value in np.unique(found) if value not in (0, 1)]:
        raise UserError(f"{_of(path)}: column {name!r} holds {wrong[0]:g}; needed: 0 and 1")
    return found.astype(np.bool_)


def labels(column: pa.ChunkedArray, path: Path, name: str) -> NDArray[np.bool_]:
    """Truth values, also written as 0 and 1."""
    return truths(numbers(column, path, name), path, name)
