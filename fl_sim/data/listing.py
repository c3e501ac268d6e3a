"""Listing of a data folder for messages: every file that is not read is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fl_sim.core.types import UserError

MOST_NAMES = 5


def entries(folder: Path) -> list[Path]:
    """List all entries of a folder by name, hidden ones too."""
    return sorted(folder.iterdir())


def hidden(path: Path) -> bool:
    """Whether its name starts with a dot: `.DS_Store`, `.ipynb_checkpoints/`, the `._x.png` of other file systems."""
    return path.name.startswith(".")


def shown(path: Path, root: Path) -> str:
    """The path within the data folder, folders with a slash at their end, in one printable line."""
    name = path.relative_to(root).as_posix() + ("/" if path.is_dir() else "")
    return name if name.isprintable() else ascii(name)


def listed(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more if names else "nothing"


def unread(paths: Iterable[Path], root: Path, allowed: str) -> list[str]:
    """A note on the entries of a data folder that are not read, with what would be; none where there are none."""
    names = [shown(path, root) for path in paths]
    many = "1 entry of the folder is" if len(names) == 1 else f"{len(names)} entries of the folder are"
    return [f"{many} not read: {listed(names)}; read are {allowed}"] if names else []


def part_missing(root: Path, needed: str) -> UserError:
    """The error of a data folder that lacks a part: says what is there instead."""
    return UserError(
        f"data.source = {str(root)!r}: no {needed}; there: {listed([shown(p, root) for p in entries(root)])}"
    )
