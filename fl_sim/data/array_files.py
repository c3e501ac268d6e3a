"""Arrays in .npy and .npz files: inputs, targets and, where there are some, groups and weights, by the names that are usual."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fl_sim.core.errors import in_one_line
from fl_sim.core.files import open_plain
from fl_sim.core.parquet import FREE_BYTES
from fl_sim.core.types import UserError
from fl_sim.data.arrays import Array, as_inputs
from fl_sim.data.cache import Arrays, Room, cached, content_key
from fl_sim.data.found import TESTS, TRAIN
from fl_sim.data.listing import entries, hidden, listed, shown, unread

SUFFIXES = (".npz", ".npy")
WORDS: Mapping[str, str] = {
    **dict.fromkeys(("x", "inputs", "input", "data", "images", "features"), "inputs"),
    **dict.fromkeys(("y", "targets", "target", "labels", "label"), "targets"),
    **dict.fromkeys(("groups", "group", "users", "writers"), "groups"),
    **dict.fromkeys(("weights", "weight"), "weights"),
}
"""Word in a name -> what the array is."""
NEEDED = "train.npz and test.npz with inputs and targets (x, y), or x_train.npy, y_train.npy, x_test.npy, y_test.npy"
MOST_PER_BYTE = 1000
"""Bytes that a byte of a compressed file may become, beyond `FREE_BYTES`."""
MOST_COLOURS = 4


def holds_arrays(root: Path) -> bool:
    """Whether a folder has .npz or .npy files at its top, or in train/."""
    return any(path.suffix.lower() in SUFFIXES for path in _files(root))


def read_array_files(path: Path) -> tuple[Arrays, list[str]]:
    """Read an .npz file, or a folder of .npz and .npy files, or take them from the cache; nothing is unpickled.

    Names are those of `WORDS` with `train` or `test` (`validation`, `valid`, `val`) before or after them, in the array's name or
    the file's: `x_train`, `test_labels`, `train.npz` with `inputs`. A single file without such words is one set.

    Returns:
        inputs, targets, groups and weights, each with `test_` before its name too where there is a test set; and notes on names
        that are not read, and on images that are turned to (N, C, H, W).

    Raises:
        UserError: no inputs or targets, an array there twice, or a file that is not what it should be.
        OSError: a file that cannot be read.
    """
    root = path if path.is_dir() else path.parent
    read = [file for file in (_files(path) if path.is_dir() else [path]) if file.suffix.lower() in SUFFIXES]

    def decode(_: Room) -> Arrays:
        arrays, notes, used = _read(path)
        arrays |= {key: as_inputs(arrays[key], key) for key in ("inputs", "test_inputs") if key in arrays}
        names = np.array([file.relative_to(root).as_posix() for file in used])
        return {**arrays, "used": names, **({"notes": np.array(notes)} if notes else {})}

    arrays = dict(cached(content_key("arrays/1", root, read), decode))
    used = [root / str(name) for name in arrays.pop("used")]
    notes = [str(note) for note in arrays.pop("notes", ())]
    if path.is_dir():
        passed = {*used, *(file.parent for file in used)}
        beside = [entry for entry in (*entries(path), *_files(path)) if entry not in passed]
        notes = unread(dict.fromkeys(beside), path, NEEDED) + notes
    return arrays, notes


def _read(path: Path) -> tuple[dict[str, Array], list[str], list[Path]]:
    """Arrays by what they are, remarks on them, and the files that they are of."""
    root = path if path.is_dir() else path.parent
    named: dict[str, Array] = {}
    files = _files(path) if path.is_dir() else [path]
    used, notes = list[Path](), list[str]()
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            continue
        for name, array in _arrays(file, shown(file, root)):
            if (key := _key(name, file, path)) is None:
                notes.append(f"array {name!r} of {shown(file, root)} is not read")
            elif key in named:
                raise UserError(
                    f"data.source = {str(path)!r}: {key} are there twice, the second time in {shown(file, root)}"
                )
            else:
                named[key] = array
                used.append(file)
    tests = [split for split in TESTS if f"{split}_inputs" in named or f"{split}_targets" in named]
    arrays = {}
    for start, split in (("", TRAIN), *(("test_", split) for split in tests[:1])):
        for what in ("inputs", "targets", "groups", "weights"):
            if (key := f"{split}_{what}") in named:
                arrays[start + what] = named.pop(key)
            elif what in ("inputs", "targets"):
                raise UserError(f"data.source = {str(path)!r}: no {split} {what}; needed: {NEEDED}")
    arrays.pop("test_weights", None)  # evaluation counts all samples alike
    notes += [f"arrays that are not read: {listed(sorted(named))}"] if named else []
    notes += [f"the test set is the split {tests[0]!r}"] if tests and tests[0] != TESTS[0] else []
    notes += _turned(arrays)
    return arrays, notes, used


def _files(root: Path) -> list[Path]:
    """Files at the top of a folder, and in the folders of its splits."""
    folders = [root, *(root / split for split in (TRAIN, *TESTS) if (root / split).is_dir())]
    return [path for folder in folders for path in entries(folder) if not path.is_dir() and not hidden(path)]


def _key(name: str, file: Path, source: Path) -> str | None:
    """`train_inputs` for an array's name in its file, such as `x` in train.npz; None where the words say nothing."""
    own = [file.stem, *([] if file.parent == source or file == source else [file.parent.name])]
    words = "_".join([name, *own]).lower().replace("-", "_").replace(".", "_").split("_")
    what = next((WORDS[word] for word in words if word in WORDS), None)
    if what is None:
        return None
    split = next((word for word in words if word in (TRAIN, *TESTS)), TRAIN)
    return f"{split}_{what}"


def _arrays(file: Path, name: str) -> Iterator[tuple[str, Array]]:
    """Names and arrays of a file."""
    with _named(name), open_plain(file) as stream:
        if file.suffix.lower() == ".npy":
            yield "", _array(stream, file.stat().st_size)
            return
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                if member.file_size > FREE_BYTES + MOST_PER_BYTE * member.compress_size:
                    raise ValueError(f"{member.compress_size} bytes that expand to {member.file_size}")
                with archive.open(member) as inner:
                    yield member.filename.removesuffix(".npy"), _array(inner, member.file_size)  # type: ignore[arg-type]


def _array(stream: BinaryIO, size: int) -> Array:
    """An array whose header says no more than there is. Raises ValueError."""
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("Python objects, which are never unpickled")
    count = math.prod(shape)
    if count * dtype.itemsize > size:
        raise ValueError(f"{dtype} {shape} in {size} bytes")
    data = stream.read(count * dtype.itemsize)
    array: NDArray[np.generic] = np.frombuffer(bytearray(data), dtype, count).reshape(
        shape, order="F" if fortran else "C"
    )
    return array


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of reading one file as a line that names it."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise UserError(f"data.source: {name}: unreadable arrays: {in_one_line(error)}") from error


def _turned(arrays: dict[str, Array]) -> list[str]:
    """Turn uint8 images (N, H, W) and (N, H, W, C) to (N, C, H, W), in place; says so."""
    notes = []
    for key in [key for key in ("inputs", "test_inputs") if key in arrays and arrays[key].dtype == np.uint8]:
        images = arrays[key]
        if images.ndim == 3:
            arrays[key], kind = images[:, None], "(N, H, W) with one channel"
        elif images.ndim == 4 and images.shape[3] <= MOST_COLOURS < min(images.shape[1:3]):
            arrays[key], kind = np.moveaxis(images, 3, 1), "(N, H, W, channels)"
        else:
            continue
        notes.append(f"uint8 {key} {images.shape} are read as images {kind}")
    return notes
