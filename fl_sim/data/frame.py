"""Data frames (pandas, polars, Arrow) as arrays: numbers as inputs, named columns as targets, groups and weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fl_sim.core.errors import in_one_line
from fl_sim.core.lookup import nearest
from fl_sim.core.types import UserError
from fl_sim.data.arrays import Array, Unshared, as_array
from fl_sim.data.table import number_classes
from fl_sim.data.table_columns import FRAME, labels, numbers, values

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("fl_sim")
HERE = Path(FRAME)
"""Stands for a file in messages."""


def is_frame(value: object) -> bool:
    """Whether a value is a data frame: it has columns, and gives them as Arrow does."""
    return hasattr(value, "__arrow_c_stream__") and (hasattr(value, "columns") or hasattr(value, "column_names"))


def read_frame(
    frame: object, targets: object, groups: object, weights: object, inputs: Sequence[str] | None = None
) -> dict[str, object]:
    """Read a frame: inputs float32 (N, features), and targets, groups and weights, which are columns' names or are left as given.

    Text, integers and truth values in one column are classes, other numbers numbers; several columns are several labels where
    all are 0 and 1, else numbers.

    Args:
        frame: a pandas or polars frame, or an Arrow table.
        targets, groups, weights: names of columns, or arrays.
        inputs: columns that a model gets; None = all others.

    Raises:
        UserError: no such column, or a column with missing values or of another kind than is needed.
    """
    table = _arrow(frame)
    asked = {"targets": targets, "groups": groups, "weights": weights}
    named = {key: [value] if isinstance(value, str) else list(value) for key, value in asked.items() if _names(value)}  # type: ignore[call-overload]
    for key, names in named.items():
        for name in names:
            if name not in table.column_names:
                raise UserError(f"data: {key}: {FRAME} has no column {name!r}{nearest(name, table.column_names)}")
    used = {name for names in named.values() for name in names}
    chosen = [name for name in table.column_names if name not in used] if inputs is None else list(inputs)
    if missing := [name for name in chosen if name not in table.column_names]:
        raise UserError(f"data: inputs: {FRAME} has no column {missing[0]!r}{nearest(missing[0], table.column_names)}")
    if not chosen or not table.num_rows:
        raise UserError(f"data: {FRAME} has {table.num_rows} rows and {len(chosen)} input columns; needed: some")
    made: dict[str, object] = dict(asked)
    rows = np.empty((table.num_rows, len(chosen)), dtype=np.float32).view(Unshared)
    for number, name in enumerate(chosen):
        rows[:, number] = numbers(table[name], HERE, name)
    made["inputs"] = rows
    if "targets" in named:
        made["targets"] = _targets(table, named["targets"])
    if "groups" in named:
        made["groups"] = values(table[named["groups"][0]], HERE, named["groups"][0])
    if "weights" in named:
        made["weights"] = numbers(table[named["weights"][0]], HERE, named["weights"][0])
    return {**made, "columns": chosen}


def numbered(parts: Mapping[str, object]) -> dict[str, object]:
    """Targets that are names or truth values as numbers of classes, in training and test set alike; says so."""
    made = dict(parts)
    own = {key: value for key in ("targets", "test_targets") if (value := _column(made.get(key), key)) is not None}
    if own and all(value.ndim == 1 and value.dtype.kind in "Ub" for value in own.values()):
        for note in number_classes(own, "targets", "classes"):
            log.warning("data: %s", note)
        made |= own
    return made


def _column(value: object, name: str) -> Array | None:
    """Targets as an array, texts as such, where they came in a list, an array, a column of a frame or as truth values of a tensor;
    else None."""
    if isinstance(value, Tensor) and value.dtype != torch.bool:
        return None
    if not (isinstance(value, (list, tuple)) or hasattr(value, "__array__")):
        return None
    found = as_array(value, name)
    if found.dtype != object or found.ndim != 1:
        return found
    is_text = [isinstance(one, str) for one in found]
    if any(is_text) and not all(is_text):
        at = is_text.index(False)
        raise UserError(f"data: {name}: sample {at} (from 0) is {found[at]!r} among texts; needed: one kind")
    return found.astype(str) if all(is_text) else found


def _names(value: object) -> bool:
    """Whether a value is one column's name, or a list of names."""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, str) for one in value)
    )


def _arrow(frame: object) -> pa.Table:
    import pyarrow as pa

    try:
        table = pa.table(frame)
    except (pa.ArrowException, ValueError, TypeError) as error:  # mixed types in a column of objects
        raise UserError(f"data: {FRAME}: {in_one_line(error)}; needed: one type in a column") from error
    count = len(getattr(frame, "columns", table.column_names))  # an index of pandas comes after the columns
    table = table.select(range(count))
    table = pa.table([_castable(column) for column in table.columns], table.column_names)
    if twice := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise UserError(f"data: {FRAME} has several columns {twice[0]!r}")
    return table


def _castable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column; categories of polars, whose texts Arrow cannot cast where they are in a dictionary, as Arrow's own."""
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_dictionary(kind) and pa.types.is_string_view(kind.value_type)):
        return column
    chunks = [(chunk.indices, chunk.dictionary.cast(pa.large_string())) for chunk in column.chunks]
    return pa.chunked_array([pa.DictionaryArray.from_arrays(*chunk) for chunk in chunks])


def _targets(table: pa.Table, names: Sequence[str]) -> Array:
    import pyarrow as pa

    if len(names) > 1:
        found = np.stack([numbers(table[name], HERE, name) for name in names], axis=1)
        if set(np.unique(found)) <= {0.0, 1.0}:
            return np.stack([labels(table[name], HERE, name) for name in names], axis=1)
        return found
    column = table[names[0]]
    read = numbers if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type) else values
    return read(column, HERE, names[0])
