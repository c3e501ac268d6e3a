"""Lets fl-sim's top-level packages `clients` and `strategies` live beside a user's files of the same names.

`clients.presets` is always ours. `clients.mine` is a file `mine.py` in any folder `clients` on `sys.path`, such as the
one where `fl-sim` runs, with or without an `__init__.py`. A name that both have is ours; `hidden` names the user's file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("clients", "strategies")


def _others(package: str) -> Iterator[str]:
    """Folders of that name on `sys.path` which are not ours."""
    for entry in sys.path:
        folder = Path(entry or ".", package)
        if folder.is_dir() and folder.resolve() != ROOT / package:
            yield str(folder)


class Finder(MetaPathFinder):
    """Finds our packages where this one is, and what they do not have in folders of the same names on `sys.path`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package not in NAMES or "." in rest:
            return None
        if not rest:
            return PathFinder.find_spec(fullname, [str(ROOT)])
        ours = PathFinder.find_spec(fullname, [str(ROOT / package)])
        return ours or PathFinder.find_spec(fullname, list(_others(package)))


def hidden(module: str) -> Path | None:
    """The user's file that would be this module if fl-sim had none of that name; None where there is none."""
    package, _, rest = module.partition(".")
    if package not in NAMES:
        return None
    places = [entry or "." for entry in sys.path] if not rest else list(_others(package))
    for place in places:
        stem = Path(place, *(rest or package).split("."))
        for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if file.is_file() and ROOT / package not in file.resolve().parents:
                return file
    return None


def install() -> None:
    """Let both be found. A user's own module that was imported under such a name before stays, and gets our modules too."""
    for name in NAMES:
        loaded = sys.modules.get(name)
        if loaded is not None and not hasattr(loaded, "__path__"):
            loaded.__path__ = [str(ROOT / name)]
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
