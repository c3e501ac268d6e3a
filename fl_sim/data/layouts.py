"""Layouts of files and folders, told by what is in them, and what reads each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fl_sim.data.array_files import holds_arrays, read_array_files
from fl_sim.data.cache import Arrays
from fl_sim.data.found import TRAIN, find_parts
from fl_sim.data.image_folder import read_image_folder
from fl_sim.data.kinds import Targets
from fl_sim.data.leaf import read_leaf
from fl_sim.data.listing import entries, hidden
from fl_sim.data.parquet_folder import holds_images, read_parquet_folder
from fl_sim.data.table import Columns
from fl_sim.data.table import read as read_rows
from fl_sim.data.table_files import READERS

Read = Callable[[Path, Columns, Targets], tuple[Arrays, list[str]]]


@dataclass(frozen=True)
class Layout:
    """A layout: what reads it, and the config's keys that say what of it."""

    read: Read
    keys: frozenset[str]


def _layout(keys: str, read: Read) -> Layout:
    return Layout(read, frozenset(f"data.{key}" for key in keys.split()))


TABLE = _layout("input target group weight test", read_rows)
IMAGES = _layout("test resize", lambda path, asked, _: read_image_folder(path, asked.resize))
PARQUET = _layout(
    "input target group test resize", lambda path, asked, _: read_parquet_folder(path, asked, asked.resize)
)
ARRAYS = _layout("test", lambda path, asked, _: read_array_files(path))
LEAF = _layout("test", lambda path, asked, targets: read_leaf(path, targets))
KEY_OF = {"data.context": "texts", "data.resize": "folders of images"}
"""Key -> what it is for, where that is no table."""


def layout_of(path: Path, columns: Columns) -> Layout | None:
    """The layout of a file or folder; None where it is neither a folder nor a file that can be read.

    Raises:
        UserError: a folder with several data sets in it.
    """
    suffix = path.suffix.lower()
    if path.is_file():
        return TABLE if suffix in READERS else ARRAYS if suffix == ".npz" else None
    if not path.is_dir():
        return None
    if (path / TRAIN).is_dir() and any(entry.is_dir() and not hidden(entry) for entry in entries(path / TRAIN)):
        return IMAGES
    if holds_arrays(path):
        return ARRAYS
    if find_parts(path, (".json",)) is not None:
        return LEAF
    found = find_parts(path, tuple(READERS))
    first = None if found is None else found.files[0]
    if first is not None and first.suffix.lower() == ".parquet" and holds_images(first):
        return PARQUET
    if columns.target or (first is not None and first.suffix.lower() != ".parquet"):
        return TABLE
    return IMAGES if first is None and (path / TRAIN).is_dir() else PARQUET


FILES = (*READERS, ".npz")
"""Suffixes of single files that are read."""
