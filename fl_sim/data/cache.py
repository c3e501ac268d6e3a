"""Decoded images on disk, memory-mapped, under the hash of what they were decoded from."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from fl_sim.core.files import open_plain
from fl_sim.data.arrays import Cached
from fl_sim.data.row_file import RowFile

Arrays = dict[str, NDArray[np.generic]]


class Room:
    """An entry of the cache that is being built: large arrays are written into it piece by piece."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.names: list[str] = []

    def rows(self, name: str, width: int) -> RowFile:
        """A float32 array of the entry, (rows, width)."""
        self.names.append(name)
        return RowFile(self._place / f"{name}.npy", width)


Decode = Callable[[Room], Arrays]
"""What decodes a source: returns its arrays, but for those that it has written into the room."""


def folder() -> Path:
    """Cache folder of decoded data: $FL_SIM_CACHE, or .cache/fl_sim in the home folder."""
    return Path(os.environ.get("FL_SIM_CACHE") or Path.home() / ".cache" / "fl_sim")


def content_key(kind: str, root: Path, files: Iterable[Path]) -> str:
    """A key over the source files: the path of each in `root`, which may say its class and part, its length and bytes.

    `kind` names the decoder and its version.

    Raises:
        OSError: a file that is none, or cannot be read.
    """
    digest = xxhash.xxh3_128(kind.encode())
    for path in files:
        with open_plain(path) as stream:
            digest.update(b"%s\0%d\0" % (os.fsencode(path.relative_to(root)), os.fstat(stream.fileno()).st_size))
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def cached(key: str, decode: Decode) -> Arrays:
    """The arrays under `key`, memory-mapped copy-on-write; decoded and stored first where missing or damaged."""
    place = folder() / key
    found = _read(place)
    if found is None:
        _write(place, decode)
        found = _read(place)
        if found is None:
            raise OSError(f"cannot read back the data cache {place}")
    return found


def _read(place: Path) -> Arrays | None:
    """None where an entry is missing or not what its index says: it is decoded anew, nothing is lost."""
    try:
        index = json.loads((place / "index.json").read_text(encoding="utf-8"))
        arrays: Arrays = {name: _mapped(place / f"{name}.npy") for name in index}
    except (OSError, ValueError, EOFError):
        return None
    intact = all([list(a.shape), str(a.dtype)] == index[name] for name, a in arrays.items())
    return arrays if intact else None


def _mapped(path: Path) -> NDArray[np.generic]:
    array: NDArray[np.generic] = np.load(path, mmap_mode="c", allow_pickle=False)
    return array.view(Cached)


def _write(place: Path, decode: Decode) -> None:
    """Written beside and renamed, so that two processes may build one entry at once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".building-") as building:
        room = Room(Path(building))
        arrays = decode(room)
        for name, array in arrays.items():
            np.save(Path(building) / f"{name}.npy", array, allow_pickle=False)
        written = {name: np.load(Path(building) / f"{name}.npy", mmap_mode="r") for name in room.names}
        index = {name: [list(a.shape), str(a.dtype)] for name, a in {**arrays, **written}.items()}
        (Path(building) / "index.json").write_text(json.dumps(index), encoding="utf-8")
        place.mkdir(exist_ok=True)
        for name in [*(f"{n}.npy" for n in index), "index.json"]:
            os.replace(Path(building) / name, place / name)
