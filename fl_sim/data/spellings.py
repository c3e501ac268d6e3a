"""Names of classes that mean the same as another one: `Dog` beside `dog`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def folded(name: str) -> str:
    """A class name without case, outer spaces, or the choice between Unicode's composed and decomposed letters."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that differ only in writing; None where there are none."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(folded(name), name)
        if other != name:
            return other, name
    return None
