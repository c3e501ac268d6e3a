"""Files of a run: written whole or not at all, and read although somebody else may have made them."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fl_sim.core.errors import UserError


def create(path: Path) -> BinaryIO:
    """Open a new, empty file in the place of whatever was there.

    A link is removed and not followed: in a folder from elsewhere it could name any file of the user.

    Raises:
        OSError: as the file system says.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")


def as_json(value: object, *, indent: int | None = None) -> str:
    """JSON as the standard has it: a number that is not finite, for which JSON has no word, is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def flush(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write beside, flush to the device, rename: `path` holds the old bytes or the new ones, never a part.

    Data may come in parts. A device or a pipe (`/dev/stdout`) is written to and not replaced.

    Raises:
        OSError: as the file system says; what was at `path` is still there.
    """
    parts = (data,) if isinstance(data, bytes) else data
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            stream.writelines(parts)
        return
    beside = path.with_name(path.name + ".tmp")
    try:
        with create(beside) as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def require_place(path: Path) -> None:
    """Complain of a path at which no file can be, before hours are spent on what shall stand in it.

    Raises:
        UserError: a folder is there, or the folder around it is missing.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: {'a folder' if path.is_dir() else 'its folder does not exist'}; needed: a file")


def require_folder(path: Path) -> None:
    """Complain of a path at which no folder is or can be made, for the same reason. Raises UserError."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{path}: {'a file' if there == path else f'{there} is a file'}; needed: a folder")


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for anything else: reading a pipe or device could block for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return path.open("rb")


def read_plain(path: Path) -> bytes:
    """Read all bytes of a file; raises as `open_plain` does."""
    with open_plain(path) as stream:
        return stream.read()
