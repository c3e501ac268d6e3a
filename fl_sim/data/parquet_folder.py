"""Parquet folders in the layouts of Hugging Face: compressed images, their labels, and their groups where a column is named."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.errors import in_one_line
from fl_sim.core.lookup import nearest
from fl_sim.core.parquet import read_schema, read_table
from fl_sim.core.types import UserError
from fl_sim.data.arrays import MOST_CLASSES, Labels
from fl_sim.data.cache import Arrays, Room, cached, content_key
from fl_sim.data.found import TRAIN, find_parts
from fl_sim.data.images import Size, decode
from fl_sim.data.listing import listed, part_missing, shown
from fl_sim.data.table import Columns
from fl_sim.data.table_columns import values

if TYPE_CHECKING:
    import pyarrow as pa

ALL = Columns()
"""No column is named: the usual names are looked for."""
IMAGE = ("img", "image")
LABEL = ("label", "labels", "fine_label")
SHARD = re.compile(r"-(\d+)-of-(\d+)\b")
FREE_IMAGES = 100_000
"""Any file may hold as many."""
IMAGES_PER_BYTE = 0.1
"""Further images for each byte of a file: ten bytes are less than the smallest image takes, even beside one like it."""


@dataclass(frozen=True)
class ImageColumns:
    """The columns that are read, those that are not, and the names of the classes where the file says them."""

    image: str
    label: str
    group: str | None
    others: tuple[str, ...]
    classes: tuple[str, ...]
    named: bool = False

    @property
    def notes(self) -> list[str]:
        """Remarks on the choice of columns that a user may not expect."""
        labels = [] if self.named or self.label == LABEL[0] else [f"the classes are those of column {self.label!r}"]
        return labels + ([f"columns that are not read: {listed(self.others)}"] if self.others else [])


READ = "train-*.parquet and test-*.parquet, or train/*.parquet and test/*.parquet (validation and valid for test)"


def holds_images(path: Path) -> bool:
    """Whether a parquet file has a column of compressed images. False where it is no parquet file."""
    import pyarrow as pa

    try:
        kinds = [field.type for field in read_schema(path)]
    except (pa.ArrowException, OSError, ValueError):
        return False
    inside = [
        kind.field("bytes").type for kind in kinds if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    ]
    return any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in (*kinds, *inside))


def read_parquet_folder(root: Path, columns: Columns = ALL, resize: Size | None = None) -> tuple[Arrays, list[str]]:
    """Decode a parquet folder, or take it from the cache.

    Args:
        root: holds the files of each split, or one folder that does.
        columns: `input` is the column of the images, `target` of the classes, `group` of the groups, where they are named.
        resize: size that all images are brought to.

    Returns:
        images, labels, and groups where they are named, each with `test_` before its name too where there is a test split; and
        notes on what is not read.

    Raises:
        UserError: no files of a part, one of its files missing or there twice, or files that are not what they should be.
        OSError: a file that cannot be read.
    """
    found = find_parts(root, (".parquet",))
    if found is None:
        raise part_missing(root, "file train-*.parquet")
    for part, files in zip((TRAIN, found.split or ""), found.parts.values(), strict=False):
        _check_complete(root, part, files)

    def read_all(_: Room) -> Arrays:
        chosen = choose_columns(root, found.files, columns)
        parts = {part: read_parquet(root, files, chosen, resize) for part, files in found.parts.items()}
        arrays: Arrays = {f"{part}{name}": array for part, read in parts.items() for name, array in read.items()}
        notes = [str(note) for part in found.parts for note in arrays.pop(f"{part}notes", ())]
        notes = list(dict.fromkeys([*chosen.notes, *notes]))
        return {**arrays, "notes": np.array(notes)} if notes else arrays

    asked = (columns.input, columns.target, columns.group, resize)
    key = "parquet/2" if not any(asked) else f"parquet/3 {asked}"
    arrays = dict(cached(content_key(key, root, found.files), read_all))
    notes = [str(note) for note in arrays.pop("notes", ())]
    return arrays, found.notes(READ) + notes


def _check_complete(root: Path, part: str, files: Sequence[Path]) -> None:
    """Files that say `-00001-of-00003` are all there, each once."""
    shards = [found for path in files if (found := SHARD.search(path.name))]
    if not shards:
        return
    where = f"data.source = {str(root)!r}: {part}-*.parquet"
    names = listed([shown(path, root) for path in files])
    totals = {int(found[2]) for found in shards}
    numbers = sorted(int(found[1]) for found in shards)
    if len(shards) < len(files) or len(totals) > 1 or len(set(numbers)) < len(numbers):
        raise UserError(f"{where}: files of several sets, or one twice: {names}")
    (total,) = totals
    if (len(numbers), numbers[0], numbers[-1]) != (total, 0, total - 1):
        raise UserError(f"{where}: not all {total} files are here: {names}")


def choose_columns(root: Path, files: Sequence[Path], asked: Columns = ALL) -> ImageColumns:
    """Choose the columns of images and labels, which are the same in every file; those that are asked for by name, if any.

    Raises:
        UserError: none, more than one of a kind, other columns in another file, or no parquet file.
    """
    found = {path: _columns(root, path, asked) for path in files}
    first, chosen = next(iter(found.items()))
    for path, columns in found.items():
        if (columns.image, columns.label) != (chosen.image, chosen.label):
            both = [f"{shown(p, root)} has {c.image!r} and {c.label!r}" for p, c in ((first, chosen), (path, columns))]
            raise UserError(f"data.source: parquet files with other columns: {'; '.join(both)}")
        if columns.classes != chosen.classes and columns.classes and chosen.classes:
            both = [f"{shown(p, root)} has {listed(c.classes)}" for p, c in ((first, chosen), (path, columns))]
            raise UserError(f"data.source: parquet files that number other classes: {'; '.join(both)}")
    return chosen


def _columns(root: Path, path: Path, asked: Columns) -> ImageColumns:
    with _named(root, path):
        schema = read_schema(path)
    names = schema.names
    for key, wanted in (("input", asked.input), ("target", asked.target), ("group", filter(None, (asked.group,)))):
        for name in wanted:
            if name not in names:
                raise UserError(f"data.{key}: {shown(path, root)} has no column {name!r}{nearest(name, names)}")
    images, labels = (
        [name for name in kind if name in names] for kind in (asked.input or IMAGE, asked.target or LABEL)
    )
    if len(images) != 1 or len(labels) != 1:
        raise UserError(
            f"data.source: {shown(path, root)} has the columns {names}; "
            f"needed: one of {', '.join(IMAGE)}, and one of {', '.join(LABEL)}; or name them: data.input, data.target"
        )
    others = tuple(name for name in names if name not in (images[0], labels[0], asked.group))
    classes = _class_names(schema, labels[0])
    return ImageColumns(images[0], labels[0], asked.group, others, classes, named=bool(asked.target))


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Names of the classes 0, 1, ... as Hugging Face's library notes them in its files; none in other files."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(ascii(name) for name in names) if isinstance(names, list) else ()


@contextmanager
def _named(root: Path, path: Path) -> Iterator[None]:
    """Errors of reading one file as a line that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"data.source: {shown(path, root)}: unreadable parquet file: {in_one_line(error)}") from error


def read_parquet(
    root: Path, files: Sequence[Path], columns: ImageColumns, resize: Size | None = None
) -> dict[str, NDArray[np.generic]]:
    """Decode the rows of all files, in order: images uint8 (N, C, H, W), labels int64 (N,), groups (N,), and notes.

    Raises:
        UserError: names the file and, where one is to blame, the row.
    """
    encoded: list[bytes | None] = []
    labels, groups, starts = list[Labels](), list[NDArray[np.generic]](), []
    for path in files:
        with _named(root, path):
            # Compressed images hardly shrink.
            table = read_table(
                path,
                [columns.image, columns.label, *filter(None, (columns.group,))],
                free_rows=FREE_IMAGES,
                rows_per_byte=IMAGES_PER_BYTE,
                bytes_per_byte=10,
            )
        starts.append(len(encoded))
        encoded += _images(table[columns.image], f"{shown(path, root)}: column {columns.image!r}")
        labels.append(_labels(table[columns.label], f"{shown(path, root)}: column {columns.label!r}"))
        groups += [] if columns.group is None else [values(table[columns.group], path, columns.group)]

    def where(number: int) -> str:
        file = bisect_right(starts, number) - 1
        return f"{shown(files[file], root)}, row {number - starts[file]}"

    images, notes = decode(encoded, stored=sum(path.stat().st_size for path in files), where=where, resize=resize)
    arrays: dict[str, NDArray[np.generic]] = {"images": images, "labels": np.concatenate(labels)}
    arrays |= {"groups": np.concatenate(groups)} if groups else {}
    return arrays | ({"notes": np.array(notes)} if notes else {})


def _images(column: pa.ChunkedArray, where: str) -> list[bytes | None]:
    """The compressed images of a column of bytes, or of structs with bytes, as Hugging Face writes them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(column.type):
        raise UserError(f"data.source: {where} holds {kind}; needed: compressed images")
    images: list[bytes | None] = column.to_pylist()
    return images


def _labels(column: pa.ChunkedArray, where: str) -> Labels:
    """The classes 0, 1, ... of a file."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not pa.types.is_integer(column.type):
        raise UserError(f"data.source: {where} holds {column.type}; needed: integers, the numbers of classes")
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise UserError(
            f"data.source: {where}: {column.null_count} labels are missing, the first in row {row} (from 0)"
        )
    given = column.to_numpy()
    wrong = np.flatnonzero((given < 0) | (given >= MOST_CLASSES))
    if len(wrong):
        row = wrong[0]
        raise UserError(
            f"data.source: {where}: {given[row]} in row {row} (from 0); needed: classes from 0 to {MOST_CLASSES - 1}"
        )
    labels: Labels = given.astype(np.int64)
    return labels
