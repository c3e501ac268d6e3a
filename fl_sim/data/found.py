"""Files of a data folder by split: `train-00000-of-00001.parquet`, `train/0000.parquet`; `valid` may stand for `test`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_sim.core.types import UserError
from fl_sim.data.listing import entries, hidden, listed, shown, unread

TRAIN = "train"
TESTS = ("test", "validation", "valid", "val")
"""Splits that may be the test set: the first one that is there."""


@dataclass(frozen=True)
class Found:
    """Files of a data folder.

    Attributes:
        root: the folder that the user named.
        base: the folder that holds the splits: `root`, or the only one in it that does.
        parts: start of the arrays' names ("", "test_") -> files of that part, in order.
        split: the split that is the test set; None where there is none.
    """

    root: Path
    base: Path
    parts: Mapping[str, Sequence[Path]]
    split: str | None

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [path for part in self.parts.values() for path in part]

    def notes(self, allowed: str) -> list[str]:
        """Remarks: which split tests, and every entry that is not read; `allowed` says what would be."""
        folders = dict.fromkeys([self.root, self.base, *(path.parent for path in self.files)])
        used = {*self.files, *folders}
        beside = [path for folder in folders for path in entries(folder) if path not in used]
        told = [] if self.split in (None, TESTS[0]) else [f"the test set is the split {self.split!r}"]
        return [*unread(beside, self.root, allowed), *told]


def find_parts(root: Path, suffixes: Sequence[str]) -> Found | None:
    """Find the files of the splits that have one of these suffixes; None where there is no training file.

    Raises:
        UserError: several folders inside hold splits.
    """
    bases = [root] if _of(root, TRAIN, suffixes) else [path for path in _folders(root) if _of(path, TRAIN, suffixes)]
    if len(bases) > 1:
        raise UserError(
            f"data.source = {str(root)!r}: several data sets: {listed([shown(path, root) for path in bases])}; name one of them"
        )
    if not bases:
        return None
    tests = {split: files for split in TESTS if (files := _of(bases[0], split, suffixes))}
    split = next(iter(tests), None)
    parts = {"": _of(bases[0], TRAIN, suffixes), **({} if split is None else {"test_": tests[split]})}
    return Found(root, bases[0], parts, split)


def _of(base: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    """Files of one split: in a folder of its name, or beside it, with a name that starts with it as a word."""
    named = re.compile(rf"{split}([-.]|_?\d)")
    inside = entries(base / split) if (base / split).is_dir() else []
    beside = [path for path in entries(base) if named.match(path.name)]
    every = [path for path in (*beside, *inside) if path.suffix.lower() in suffixes and not hidden(path)]
    return [path for path in every if not path.is_dir()]


def _folders(root: Path) -> list[Path]:
    return [path for path in entries(root) if path.is_dir() and not hidden(path)]
