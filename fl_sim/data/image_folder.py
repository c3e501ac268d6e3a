"""Image folders: train/<class>/ and test/<class>/, each file a compressed image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fl_sim.core.files import read_plain
from fl_sim.core.types import UserError
from fl_sim.data.cache import Arrays, Room, cached, content_key
from fl_sim.data.found import TESTS, TRAIN
from fl_sim.data.images import Size, decode
from fl_sim.data.listing import entries, hidden, listed, shown, unread
from fl_sim.data.pictures import Images
from fl_sim.data.spellings import alike

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm")


@dataclass(frozen=True)
class Part:
    """The images of train/ or test/ by class, and the entries that are not read."""

    classes: Mapping[str, Sequence[Path]]
    unread: Sequence[Path]


def read_image_folder(root: Path, resize: Size | None = None) -> tuple[Arrays, list[str]]:
    """Decode an image folder, or take it from the cache. Classes are numbered in the order of their names.

    The test set is test/, else validation/, valid/ or val/; there may be none. `resize` is the size that all images get.

    Hidden files and folders, empty class folders and files with another suffix are not read.

    Returns:
        images, labels, and test_images and test_labels where there is a test set; and notes on what is not read.

    Raises:
        UserError: a part is missing, a class folder holds files of which none is read, or the classes of the parts differ.
        OSError: a file that cannot be read.
    """
    held = [part for part in TESTS if (root / part).is_dir()][:1]
    parts = {part: _part(root, part) for part in (TRAIN, *held)}
    _check_classes(root, {name: list(part.classes) for name, part in parts.items()})
    files = {name: [path for of in part.classes.values() for path in of] for name, part in parts.items()}
    numbers = {
        name: np.repeat(np.arange(len(part.classes)), [len(of) for of in part.classes.values()])
        for name, part in parts.items()
    }

    def read_all(_: Room) -> Arrays:
        arrays: Arrays = {}
        notes = list[str]()
        for start, part in zip(("", "test_"), parts, strict=False):
            arrays[f"{start}images"], said = _read(root, files[part], resize)
            arrays[f"{start}labels"] = numbers[part].astype(np.int64)
            notes += said
        return {**arrays, "notes": np.array(list(dict.fromkeys(notes)))} if notes else arrays

    beside = [path for path in entries(root) if path.name not in parts]
    passed_over = [*beside, *(path for part in parts.values() for path in part.unread)]
    kind = "folder/2" if resize is None else f"folder/3 {resize}"
    arrays = dict(cached(content_key(kind, root, [path for part in files.values() for path in part]), read_all))
    notes = [str(note) for note in arrays.pop("notes", ())]
    told = [f"the test set is the split {part!r}" for part in held if part != TESTS[0]]
    allowed = f"train/<class>/ and test/<class>/, {', '.join(SUFFIXES)}"
    return arrays, [*unread(passed_over, root, allowed), *told, *notes]


def _part(root: Path, part: str) -> Part:
    classes: dict[str, list[Path]] = {}
    others: list[Path] = []
    for folder in entries(root / part):
        if hidden(folder) or not folder.is_dir():
            others.append(folder)
            continue
        images: list[Path] = []
        rest: list[Path] = []
        for path in entries(folder):
            (images if _is_image(path) else rest).append(path)
        if images:
            classes[folder.name] = images
        elif wrong := [shown(path, root) for path in rest if not hidden(path)]:
            raise UserError(
                f"data.source = {str(root)!r}: no images in {shown(folder, root)}, but {listed(wrong)}; "
                f"allowed: {part}/<class>/ with {', '.join(SUFFIXES)}"
            )
        others += rest if images else [folder]
    if not classes:
        inside = entries(root / part)
        raise UserError(
            f"data.source = {str(root)!r}: no images in {part}/<class>/; there: "
            f"{listed([shown(path, root) for path in inside])}; allowed: {', '.join(SUFFIXES)}, or parquet files "
            f"named {part}-*.parquet in a folder without {part}/"
        )
    return Part(classes, others)


def _is_image(path: Path) -> bool:
    """By its name: a broken link or a pipe called so is complained of when it is read."""
    return path.suffix.lower() in SUFFIXES and not hidden(path) and not path.is_dir()


def _check_classes(root: Path, classes: Mapping[str, Sequence[str]]) -> None:
    """Both parts have the same classes, and no two of a part are one name written in two ways."""
    where = f"data.source = {str(root)!r}"
    for part, names in classes.items():
        if pair := alike(names):
            raise UserError(f"{where}: classes of {part}/ that differ only in writing: {pair[0]!a} and {pair[1]!a}")
    if len(classes) < 2:
        return
    (first, second), (train, test) = classes, (set(names) for names in classes.values())
    if train != test:
        only = {first: sorted(train - test), second: sorted(test - train)}
        said = "; ".join(
            f"only in {part}/: {listed([ascii(n) for n in names])}" for part, names in only.items() if names
        )
        raise UserError(f"{where}: {first}/ and {second}/ have other classes: {said}")


def _read(root: Path, files: Sequence[Path], resize: Size | None) -> tuple[Images, list[str]]:
    encoded = [read_plain(path) for path in files]
    return decode(
        encoded, stored=sum(map(len, encoded)), where=lambda number: shown(files[number], root), resize=resize
    )
