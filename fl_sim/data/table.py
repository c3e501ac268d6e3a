"""Tables: a CSV or parquet file, or a folder with train*.csv and test*.csv; numbers as inputs, named columns as targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.lookup import nearest
from fl_sim.core.parquet import release_unused
from fl_sim.core.types import UserError
from fl_sim.data.arrays import MOST_CLASSES, Array
from fl_sim.data.cache import Arrays, Room, cached, content_key
from fl_sim.data.found import find_parts
from fl_sim.data.kinds import Targets
from fl_sim.data.listing import listed, part_missing
from fl_sim.data.numbering import numbered
from fl_sim.data.spellings import alike
from fl_sim.data.table_columns import truths
from fl_sim.data.table_files import READERS, Asked, column_names
from fl_sim.data.table_rows import TableRows, read_rows
from fl_sim.data.weights import POSITIVE


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
        inputs, targets, and groups where there are some, as numbers; each with `test_` before its name too where the table is a
        folder with test files. `group_names`, by number. And notes on what is not read.

    Raises:
        UserError: no such column, a column that holds something else than is needed, or values that are missing.
        OSError: a file that cannot be read.
    """
    if targets not in (Targets.CLASSES, *TARGETS):
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
        _require_same(used[0], chosen[0].inputs, file, other.inputs)
    if targets is Targets.CLASSES and len(columns.target) > 1:
        raise UserError(
            f"data.target: {len(columns.target)} columns; a classification has one; task = 'multilabel' has several"
        )
    key = json.dumps(["table/5", targets.name, asdict(columns)])

    def decode(room: Room) -> Arrays:
        parts = {part: _part(part, some, chosen[0], targets, room) for part, some in files.items()}
        release_unused()
        arrays: Arrays = {name: array for read, _ in parts.values() for name, array in read.items()}
        more, notes = _numbered({part: rows for part, (_, rows) in parts.items()}, chosen[0], targets)
        notes += [
            f"column {name!r} counts the rows, and is an input; data.input names the columns to read"
            for name in parts[""][1].counting
        ]
        return arrays | more | ({"notes": np.array(notes)} if notes else {})

    root = path if path.is_dir() else path.parent
    arrays = dict(cached(content_key(key, root, used), decode))
    notes = [str(note) for note in arrays.pop("notes", ())]
    return arrays, notes if found is None else found.notes("train*.csv and test*.csv, or .parquet") + notes


def _chosen(path: Path, columns: Columns) -> Chosen:
    """The columns of a file that are read. Raises UserError where it lacks one that is named."""
    names = column_names(path)
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


def _require_same(first: Path, wanted: Sequence[str], file: Path, there: Sequence[str]) -> None:
    """Complain of a file whose columns are not those of the first; their order may differ. Raises UserError."""
    if lacks := [name for name in wanted if name not in there]:
        raise UserError(f"data.source: {file.name} lacks columns of {first.name}: {listed(lacks)}")
    if more := [name for name in there if name not in wanted]:
        raise UserError(
            f"data.source: {file.name} has columns that {first.name} lacks: {listed(more)}; data.input names the columns to read"
        )


def _part(part: str, files: Sequence[Path], chosen: Chosen, targets: Targets, room: Room) -> tuple[Arrays, TableRows]:
    """The rows of one part's files: arrays of numbers; inputs are in the room."""
    names = [name for name in (*(chosen.targets if targets is Targets.CLASSES else ()), chosen.group) if name]
    others = [] if targets is Targets.CLASSES else list(chosen.targets)
    others += [] if chosen.weight is None else [chosen.weight]
    out = room.rows(f"{part}inputs", len(chosen.inputs))
    rows = read_rows(files, chosen.inputs, Asked([*chosen.inputs, *others], names), out)
    arrays: Arrays = {}
    if targets is not Targets.CLASSES:
        found = [TARGETS[targets](rows.column(name), files[0], name) for name in chosen.targets]
        one = len(found) == 1 and targets is Targets.NUMBERS
        arrays[f"{part}targets"] = found[0] if one else np.stack(found, axis=1)
    if chosen.weight is not None:
        arrays[f"{part}weights"] = _positive(rows.column(chosen.weight), chosen.weight)
    return arrays, rows


def _as_read(numbers: NDArray[np.float32], path: Path, name: str) -> NDArray[np.generic]:
    return numbers


TARGETS: Mapping[Targets, Callable[[NDArray[np.float32], Path, str], NDArray[np.generic]]] = {
    Targets.NUMBERS: _as_read,
    Targets.LABELS: truths,
}
"""Kind of targets that are no classes -> what makes them of numbers; a table holds no sequences of tokens."""


def _positive(weights: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if not (weights > 0).all():
        row = int((weights <= 0).argmax())
        raise UserError(f"data.weight: {name!r} is {weights[row]:g} in row {row} (from 0); needed: {POSITIVE}")
    return weights


def _numbered(parts: Mapping[str, TableRows], chosen: Chosen, targets: Targets) -> tuple[Arrays, list[str]]:
    """Classes and groups of all parts as numbers, with the names of the groups; and notes on what the classes are."""
    arrays: Arrays = {}
    notes = list[str]()
    for key, name, what in (
        ("targets", chosen.targets[0] if targets is Targets.CLASSES else None, "class"),
        ("groups", chosen.group, "group"),
    ):
        if name is None:
            continue
        columns = [(part, column) for part, rows in parts.items() for column in rows.names[name]]
        every, numbers = numbered([column for _, column in columns], what)
        for part in parts:
            mine = [own for (whose, _), own in zip(columns, numbers, strict=True) if whose == part]
            arrays[f"{part}{key}"] = np.concatenate(mine)
        if key == "groups":
            arrays["group_names"] = every.astype(str)
        else:
            notes = classes_note(every, f"classes of column {name!r}")
    return arrays, notes


def number_classes(arrays: dict[str, Array], name: str, what: str) -> list[str]:
    """Number the values of an array and of that of the test set, in their order, in place; returns a note where they change."""
    parts = [key for key in (name, f"test_{name}") if key in arrays]
    values, numbers = np.unique(np.concatenate([arrays[key] for key in parts]), return_inverse=True)
    notes = classes_note(values, what)
    cuts = np.cumsum([len(arrays[key]) for key in parts])[:-1]
    for key, part in zip(parts, np.split(numbers.astype(np.int64), cuts), strict=True):
        arrays[key] = part
    return notes


def classes_note(values: Array, what: str) -> list[str]:
    """What classes are numbered, where they are not 0, 1, ... themselves.

    Raises:
        UserError: two that differ only in writing, or too many.
    """
    if values.dtype.kind == "U" and (pair := alike(map(str, values))):
        raise UserError(f"data.source: {what} that differ only in writing: {pair[0]!a} and {pair[1]!a}")
    if len(values) > MOST_CLASSES:
        raise UserError(f"data.source: {len(values)} {what}; allowed: {MOST_CLASSES}")
    as_they_are = np.array_equal(values, np.arange(len(values)))
    return [] if as_they_are else [f"{what}, from 0: {listed([str(value) for value in values])}"]
