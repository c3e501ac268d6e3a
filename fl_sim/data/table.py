"""Tables: a CSV or parquet file, or a folder with train*.csv and test*.csv; numbers as inputs, named columns as targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.errors import in_one_line
from fl_sim.core.lookup import nearest
from fl_sim.core.parquet import array_of, count_rows, read_schema, read_table, release_unused
from fl_sim.core.types import UserError
from fl_sim.data.arrays import MOST_CLASSES, Array, Labels, check_rounding
from fl_sim.data.cache import Arrays, cached, content_key
from fl_sim.data.csv_file import read_csv
from fl_sim.data.found import find_parts
from fl_sim.data.kinds import Targets
from fl_sim.data.listing import listed, part_missing
from fl_sim.data.spellings import alike, merged_numbers
from fl_sim.data.weights import POSITIVE

if TYPE_CHECKING:
    import pyarrow as pa

FRAME = "the frame"
"""What messages call a data frame, which has no file."""
COUNTING = 0.99
"""Share of the rows in which a number is one more than in the row before, from which a column counts them."""


@dataclass(frozen=True)
class Columns:
    """What of a table or a text is read.

    Attributes:
        input: columns that a model gets; empty = all but `target` and `group`.
        target: the column, or columns, to predict; empty where the source is no table.
        group: the column of each row's group, such as its user or site; None = there are none.
        weight: the column of each training row's weight in the loss; None = all count alike.
        test: share of the rows for the test set, where the table has no file of its own for it; None = `fl_sim.data.sampling.TEST`.
        context: characters of a text that a model sees at once; None = `fl_sim.data.text.CONTEXT`.
        resize: (height, width) that images are brought to; None = all must have one size.
    """

    input: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    group: str | None = None
    weight: str | None = None
    test: float | None = None
    context: int | None = None
    resize: tuple[int, int] | None = None

    @property
    def asked(self) -> list[str]:
        """The config's keys that are set."""
        return [f"data.{name}" for name, value in asdict(self).items() if value not in ((), None)]


@dataclass(frozen=True)
class Chosen:
    """Columns that were found in a table, in order."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    group: str | None
    weight: str | None


def read(path: Path, columns: Columns, targets: Targets) -> tuple[Arrays, list[str]]:
    """Read a table, or take it from the cache: inputs float32 (N, features), targets of this kind, and groups.

    Returns:
        inputs, targets, and groups where there are some; each with `test_` before its name too where the table is a folder
        with test files. And notes on what is not read.

    Raises:
        UserError: no such column, a column that holds something else than is needed, or values that are missing.
        OSError: a file that cannot be read.
    """
    if targets not in TARGETS:
        raise UserError(f"data.source: {path.name} is a table; it has no targets of this kind: {targets.value}")
    found = find_parts(path, tuple(READERS)) if path.is_dir() else None
    if path.is_dir() and found is None:
        raise part_missing(path, "file train*.csv or train*.parquet")
    files: Mapping[str, Sequence[Path]] = {"": [path]} if found is None else found.parts
    if found is not None and found.split is not None and columns.test is not None:
        raise UserError(f"data.test = {columns.test:g}: {path} has test files of its own; leave data.test out")
    used = [file for part in files.values() for file in part]
    chosen = [_chosen(file, columns) for file in used]
    for file, other in zip(used, chosen, strict=True):
        if other != chosen[0]:
            raise UserError(f"data.source: {used[0].name} and {file.name} have other columns")
    key = json.dumps(["table/4", targets.name, asdict(columns)])

    def decode() -> Arrays:
        parts = {part: _part(some, chosen[0], targets) for part, some in files.items()}
        _check_spellings(used, chosen[0], targets)
        release_unused()
        arrays: Arrays = {f"{part}{name}": array for part, read in parts.items() for name, array in read.items()}
        return _numbered(arrays, targets, chosen[0])

    root = path if path.is_dir() else path.parent
    arrays = dict(cached(content_key(key, root, used), decode))
    notes = [str(note) for note in arrays.pop("notes", ())]
    return arrays, notes if found is None else found.notes("train*.csv and test*.csv, or .parquet") + notes


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reading one file as a line that names it."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"data.source: {path.name}: unreadable table: {in_one_line(error)}") from error


def _chosen(path: Path, columns: Columns) -> Chosen:
    """The columns of a file that are read. Raises UserError where it lacks one that is named."""
    with _named(path):
        names = READERS[path.suffix.lower()].names(path)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.source: {path.name} has several columns {twice[0]!r}")
    if not columns.target:
        raise UserError(f"data.target is not set: {path.name} has the columns {listed(names)}; name the one to predict")
    asked = [("input", name) for name in columns.input] + [("target", name) for name in columns.target]
    extra = [(key, name) for key in ("group", "weight") if (name := getattr(columns, key)) is not None]
    for key, name in [*asked, *extra]:
        if name not in names:
            raise UserError(f"data.{key}: {path.name} has no column {name!r}{nearest(name, names)}")
    rest = tuple(name for name in names if name not in (*columns.target, columns.group, columns.weight))
    inputs = columns.input or rest
    for key, some in (("input", inputs), ("target", columns.target)):
        if again := [name for name in some if some.count(name) > 1]:
            raise UserError(f"data.{key}: {again[0]!r} is named more than once")
    if both := [name for name in inputs if name in columns.target]:
        raise UserError(f"data.input: {both[0]!r} is data.target too: what is to be predicted is no input")
    if not inputs:
        raise UserError(f"data.input: {path.name} has no column beside data.target, data.group and data.weight")
    if columns.weight is not None and columns.weight in (*inputs, *columns.target, columns.group):
        raise UserError(f"data.weight: {columns.weight!r} is an input, target or group too")
    return Chosen(inputs, columns.target, columns.group, columns.weight)


def _part(files: Sequence[Path], chosen: Chosen, targets: Targets) -> Arrays:
    """The rows of all files, in order; classes and groups as values, which are numbered later."""
    tables = {path: _opened(path, chosen) for path in files}
    rows = [tables[path].rows for path in files]
    if not sum(rows):
        raise UserError(f"data.source: {files[0].name}: no rows")
    inputs = np.empty((sum(rows), len(chosen.inputs)), dtype=np.float32)
    for number, name in enumerate(chosen.inputs):
        for path, end, count in zip(files, np.cumsum(rows), rows, strict=True):
            inputs[end - count : end, number] = numbers(tables[path].column(name), path, name)
    found = [
        np.concatenate([TARGETS[targets](table.column(name), path, name) for path, table in tables.items()])
        for name in chosen.targets
    ]
    if len(found) > 1 and targets is Targets.CLASSES:
        raise UserError(f"data.target: {len(found)} columns; a classification has one; task = 'multilabel' has several")
    one = found[0] if len(found) == 1 and targets is not Targets.LABELS else np.stack(found, axis=1)
    arrays: Arrays = {"inputs": inputs, "targets": one}
    if chosen.group is not None:
        groups = [values(table.column(chosen.group), path, chosen.group) for path, table in tables.items()]
        arrays["groups"] = np.concatenate(groups)
    if chosen.weight is not None:
        arrays["weights"] = _weights(tables, chosen.weight)
    return arrays


@dataclass(frozen=True)
class Opened:
    """A file: the number of its rows, and its columns, each of which is read or given once."""

    rows: int
    column: Callable[[str], pa.ChunkedArray]


def _opened(path: Path, chosen: Chosen) -> Opened:
    """A file whose columns are read one at a time, where its format allows that."""
    wanted = [*chosen.inputs, *chosen.targets, *filter(None, (chosen.group, chosen.weight))]
    reader = READERS[path.suffix.lower()]

    def alone(name: str) -> pa.ChunkedArray:
        with _named(path):
            return reader.read(path, [name])[name]

    if reader.rows is not None:
        with _named(path):
            return Opened(reader.rows(path), alone)
    with _named(path):
        table = reader.read(path, list(dict.fromkeys(wanted)))
    return Opened(len(table), table.column)


def _weights(tables: Mapping[Path, Opened], name: str) -> NDArray[np.float32]:
    weights = np.concatenate([numbers(table.column(name), path, name) for path, table in tables.items()])
    if not (weights > 0).all():
        row = int((weights <= 0).argmax())
        raise UserError(f"data.weight: {name!r} is {weights[row]:g} in row {row}; needed: {POSITIVE}")
    return weights


def _of(path: Path) -> str:
    return f"data: {FRAME}" if path.name == FRAME else f"data.source: {path.name}"


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is text, in any of its three layouts."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _there(column: pa.ChunkedArray, path: Path, name: str) -> pa.ChunkedArray:
    """The column, a dictionary's as its values. Raises UserError where values are missing: no value, or an empty name."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        missing = np.array([value is None or not value.strip() for value in column.to_pylist()], dtype=bool)
    elif column.null_count:
        missing = column.is_null().to_numpy()
    else:
        return column
    if missing.any():
        raise UserError(
            f"{_of(path)}: column {name!r}: {missing.sum()} values are missing, the first in row {missing.argmax()}; "
            "fill them in, or leave the rows out"
        )
    return column


def numbers(column: pa.ChunkedArray, path: Path, name: str) -> NDArray[np.float32]:
    """float32 numbers."""
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
        raise UserError(f"{where} holds NaN or infinity, first in row {row}; needed: finite numbers of float32")
    check_rounding(f"{where}: its values", given, numbers)
    return numbers


def _told(column: pa.ChunkedArray) -> str:
    """The type of a column that is not what it should be; of text, the first value that is no number."""

    if not (is_text(column.type)):
        return str(column.type)
    for row, value in enumerate(column.to_pylist()):
        try:
            float(value)
        except ValueError:
            return f"text, for instance {value[:40]!r} in row {row}"
    return "text"


def values(column: pa.ChunkedArray, path: Path, name: str) -> NDArray[np.generic]:
    """Integers or names, one a row: classes or groups."""
    import pyarrow as pa

    column, kind = _there(column, path, name), column.type
    if pa.types.is_boolean(column.type) or pa.types.is_integer(column.type):
        given = column.to_numpy() if pa.types.is_boolean(column.type) else array_of(column)
        if given.dtype == np.uint64 and len(given) and given.max() > np.iinfo(np.int64).max:
            raise UserError(f"data.source: {path.name}: column {name!r} holds {given.max()}; needed: integers of int64")
        integers: Labels = given.astype(np.int64)
        return integers
    if is_text(column.type):
        return np.array(column.to_pylist(), dtype=str)
    raise UserError(f"{_of(path)}: column {name!r} holds {kind}; needed: integers or names")


def labels(column: pa.ChunkedArray, path: Path, name: str) -> NDArray[np.bool_]:
    """Truth values, also written as 0 and 1."""
    found = numbers(column, path, name)
    if wrong := [float(value) for value in np.unique(found) if value not in (0, 1)]:
        raise UserError(f"{_of(path)}: column {name!r} holds {wrong[0]:g}; needed: 0 and 1")
    return found.astype(np.bool_)


TARGETS: Mapping[Targets, Callable[[pa.ChunkedArray, Path, str], NDArray[np.generic]]] = {
    Targets.CLASSES: values,
    Targets.NUMBERS: numbers,
    Targets.LABELS: labels,
}
"""Kind of targets -> how a target column is read; a table holds no sequences of tokens."""


def _check_spellings(files: Sequence[Path], chosen: Chosen, targets: Targets) -> None:
    """Complain of two texts of a column of names that would be read as one: class `01` beside class `1`."""
    named = {
        "group": [chosen.group] if chosen.group else [],
        "class": chosen.targets if targets is Targets.CLASSES else [],
    }
    written = [file for file in files if file.suffix.lower() == ".csv"]
    for what, names in named.items():
        for name in names:
            if pair := merged_numbers(written, name):
                raise UserError(
                    f"data.source: column {name!r}: {pair[0]!r} and {pair[1]!r} would be one {what}; write it in one way"
                )


def _numbered(arrays: Arrays, targets: Targets, chosen: Chosen) -> Arrays:
    """The arrays with classes as numbers, in the order of their values; and notes on that. `Data.of` numbers groups."""
    made, notes = dict(arrays), []
    if targets is Targets.CLASSES:
        notes = number_classes(made, "targets", f"classes of column {chosen.targets[0]!r}")
    counting = [name for name, column in zip(chosen.inputs, made["inputs"].T, strict=True) if _counts_rows(column)]
    notes += [
        f"column {name!r} counts the rows, and is an input; data.input names the columns to read" for name in counting
    ]
    return {**made, "notes": np.array(notes)} if notes else made


def _counts_rows(column: NDArray[np.generic]) -> bool:
    """Whether numbers go up by one from row to row, as an index does; in each of several files from its start."""
    return len(column) > 2 and bool((np.diff(column) == 1).mean() > COUNTING)


def number_classes(arrays: dict[str, Array], name: str, what: str) -> list[str]:
    """Number the values of an array and of that of the test set, in their order, in place; returns a note where they change."""
    parts = [key for key in (name, f"test_{name}") if key in arrays]
    values, numbers = np.unique(np.concatenate([arrays[key] for key in parts]), return_inverse=True)
    if values.dtype.kind == "U" and (pair := alike(map(str, values))):
        raise UserError(f"data.source: {what} that differ only in writing: {pair[0]!a} and {pair[1]!a}")
    if len(values) > MOST_CLASSES:
        raise UserError(f"data.source: {len(values)} {what}; allowed: {MOST_CLASSES}")
    cuts = np.cumsum([len(arrays[key]) for key in parts])[:-1]
    for key, part in zip(parts, np.split(numbers.astype(np.int64), cuts), strict=True):
        arrays[key] = part
    as_they_are = np.array_equal(values, np.arange(len(values)))
    return [] if as_they_are else [f"{what}, from 0: {listed([str(value) for value in values])}"]


@dataclass(frozen=True)
class Reader:
    """Reader of one file format: the names of its columns, some of its columns as a table, and the number of its rows where
    columns lie apart, so that each can be read alone."""

    names: Callable[[Path], list[str]]
    read: Callable[[Path, list[str]], pa.Table]
    rows: Callable[[Path], int] | None = None


READERS: Mapping[str, Reader] = {
    ".csv": Reader(lambda path: list(read_csv(path, None).schema.names), read_csv),
    ".parquet": Reader(
        lambda path: list(read_schema(path).names), lambda path, columns: read_table(path, columns), count_rows
    ),
}
