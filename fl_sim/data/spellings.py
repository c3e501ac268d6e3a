"""Names of classes and groups that mean the same as another one: `01` beside `1`, `Dog` beside `dog`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from fl_sim.data.csv_file import read_csv


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


def merged_numbers(files: Iterable[Path], column: str) -> tuple[str, str] | None:
    """Two texts of a CSV column that are read as one number or truth value, such as `01` and `1`; None where there are none."""
    first: dict[object, str] = {}
    for file in files:
        for text, value in _read_as(file, column):
            other = first.setdefault(value, text)
            if other != text and not isinstance(value, str):
                return other, text
    return None


def _read_as(file: Path, column: str) -> Iterable[tuple[str, object]]:
    """Each text of a column once, with the value that it is read as."""
    import pyarrow as pa

    texts = read_csv(file, [column], types={column: pa.string()})[column].combine_chunks().dictionary_encode()
    values = read_csv(file, [column])[column]
    seen: dict[int, int] = {}
    for row, index in enumerate(texts.indices.to_pylist()):
        seen.setdefault(index, row)
    words = texts.dictionary.to_pylist()
    return [(words[index], values[row].as_py()) for index, row in seen.items() if index is not None]
