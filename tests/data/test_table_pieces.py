"""Tables are read piece by piece: the same arrays and the same complaints as of whole columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fl_sim.core.types import UserError
from fl_sim.data import Data, load
from fl_sim.data.kinds import Targets
from fl_sim.data.row_file import RowFile
from fl_sim.data.table import Columns
from fl_sim.data.table_files import READERS

ROWS = 90
RNG = np.random.default_rng(0)
GOOD: Mapping[str, object] = {
    "count": np.arange(ROWS) * 7 % 13,
    "mixed": [str(i) if i < 60 else f"{i}.5" for i in range(ROWS)],  # integers, and fractions from the third block on
    "level": RNG.normal(size=ROWS).round(4),
    "true": ["true" if i % 3 else "false" for i in range(ROWS)],
    "site": [f"s{i * 11 % 17:02}" for i in range(ROWS)],
    "kind": np.array([3, 1, 2])[np.arange(ROWS) % 3],
    "weight": 1 + np.arange(ROWS) % 5,
    "late": [*range(70), "x", *range(71, ROWS)],
    "times": 1_700_000_000 + np.arange(ROWS) * 86_400,
}
COLUMNS = Columns(("count", "mixed", "level", "true", "times"), ("kind",), "site", "weight")


@pytest.fixture(autouse=True)
def small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fl_sim.data.csv_file.BLOCK", 1000)
    monkeypatch.setattr("fl_sim.core.parquet.BATCH", 7)


def written(folder: Path, name: str, **changes: object) -> Path:
    columns = {**GOOD, **changes}
    path = folder / name
    if path.suffix == ".parquet":
        columns["mixed"] = np.array(columns["mixed"], dtype=float)
        columns["true"] = [one == "true" for one in columns["true"]]  # type: ignore[attr-defined]
        columns["late"] = list(map(str, columns["late"]))  # type: ignore[call-overload]
        pq.write_table(pa.table(columns), path, row_group_size=40)
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def whole(monkeypatch: pytest.MonkeyPatch, suffix: str, folder: Path) -> None:
    """Whole columns alone, in a cache of their own."""
    monkeypatch.setenv("FL_SIM_CACHE", str(folder / "other"))
    reader = READERS[suffix]
    monkeypatch.setitem(READERS, suffix, replace(reader, ways=reader.ways[-1:]))  # type: ignore[arg-type]


def equal(one: Data, other: Data) -> None:
    assert (one.groups, one.num_classes) == (other.groups, other.num_classes)
    for part in ("train", "validation", "test"):
        mine, theirs = getattr(one, part), getattr(other, part)
        for name in ("images", "labels", "groups", "weights", "mean", "std"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_pieces_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    levels = RNG.normal(size=2 * ROWS).round(4)
    for number, part in enumerate(np.split(levels, 2)):
        written(folder, f"train-{number}{suffix}", level=part)
    written(folder, f"test{suffix}")
    pieces = load(str(folder), columns=COLUMNS)
    whole(monkeypatch, suffix, tmp_path)
    equal(pieces, load(str(folder), columns=COLUMNS))
    read = torch.cat([pieces.train.images, pieces.validation.images])[:, 2].numpy()
    assert np.array_equal(np.sort(read), np.sort(levels.astype(np.float32)))


def test_both_formats_are_the_same(tmp_path: Path) -> None:
    equal(*(load(str(written(tmp_path, f"t{suffix}")), columns=COLUMNS) for suffix in (".csv", ".parquet")))


def test_no_file_is_read_whole_that_need_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> object:
        raise AssertionError("read whole")

    for suffix in (".csv", ".parquet"):
        reader = READERS[suffix]
        monkeypatch.setitem(READERS, suffix, replace(reader, ways=(*reader.ways[:-1], refuse)))  # type: ignore[arg-type]
        columns = replace(COLUMNS, target=("level",), input=("count", "mixed", "times"))
        load(str(written(tmp_path, f"t{suffix}")), columns=columns, targets=Targets.NUMBERS)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("columns", "changes", "words"),
    [
        (
            Columns(("late",), ("kind",)),
            {},
            "column 'late' holds text, for instance 'x' in row 70 (from 0); needed: numbers",
        ),
        (
            Columns(("level",), ("kind",)),
            {"level": [float("inf") if i == 80 else 0.5 * i for i in range(ROWS)]},
            "column 'level' holds NaN or infinity, first in row 80 (from 0)",
        ),
        (
            Columns(("level",), ("kind",), "site"),
            {"site": ["" if i in (33, 77) else "a" for i in range(ROWS)]},
            "column 'site': 2 values are missing, the first in row 33 (from 0)",
        ),
        (
            Columns(("times",), ("kind",)),
            {"times": 1_700_000_000 + np.arange(ROWS)},
            "float32 does not tell these numbers apart",
        ),
        (Columns(("count",), ("level",)), {}, "column 'level' holds double; needed: integers or names"),
    ],
)
def test_what_is_wrong_is_said_with_the_row_of_the_file(
    tmp_path: Path, suffix: str, columns: Columns, changes: Mapping[str, object], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(str(written(tmp_path, f"t{suffix}", **changes)), columns=columns)
    assert words in str(caught.value)


def test_rows_are_written_in_any_order_and_cut(tmp_path: Path) -> None:
    out = RowFile(tmp_path / "rows.npy", 3)
    block = np.arange(12, dtype=np.float32).reshape(4, 3)
    out.put(4, [0, 1, 2], block)
    out.put(0, [2, 0], block[:, [2, 0]])
    out.put(0, [1], block[:, [1]])
    out.finish(7)
    assert np.array_equal(np.load(tmp_path / "rows.npy"), np.concatenate([block, block])[:7])
