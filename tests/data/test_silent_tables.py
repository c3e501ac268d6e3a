"""Tables whose numbers would be wrong without a word: missing names, numbers beyond float32's precision, columns without spread."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_sim.core.types import UserError
from fl_sim.data import Data, load
from fl_sim.data.kinds import Targets
from fl_sim.data.table import Columns

ROWS = range(40)
Y = Columns(target=("y",))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))


def written(folder: Path, **columns: list[object]) -> str:
    path = folder / "t.csv"
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


NUMBERS: dict[str, list[object]] = {"a": [*ROWS], "y": [i % 2 for i in ROWS]}
SECONDS: list[object] = [1_700_000_000 + i for i in ROWS]
UNTOLD = "float32 does not tell these numbers apart"
CLASSES = Targets.CLASSES


def names(odd: str, *at: int) -> list[object]:
    """The names a and b in turn, and another one in some rows."""
    return [odd if i in at else "ab"[i % 2] for i in ROWS]


REFUSED: Mapping[str, tuple[dict[str, list[object]], Columns, Targets, str]] = {
    "a class without a name": (
        {"y": names("", 5)},
        Y,
        CLASSES,
        "'y': 1 values are missing, the first in row 5 (from 0)",
    ),
    "a class in blanks": ({"y": names("  ", 6)}, Y, CLASSES, "'y': 1 values are missing, the first in row 6 (from 0)"),
    "a class in quotes": ({"y": names('""', 7)}, Y, CLASSES, "'y': 1 values are missing, the first in row 7 (from 0)"),
    "not available": (
        {"y": names("NA", 38, 39)},
        Y,
        CLASSES,
        "'y': 2 values are missing, the first in row 38 (from 0)",
    ),
    "a group without a name": ({"g": names("", 3)}, Columns(("a",), ("y",), "g"), CLASSES, "'g': 1 values are missing"),
    "times of a minute": ({"a": SECONDS}, Y, CLASSES, UNTOLD),
    "a minute to predict": ({"y": SECONDS}, Y, Targets.NUMBERS, UNTOLD),
    "long numbers": ({"a": [10**18 + i for i in ROWS]}, Y, CLASSES, UNTOLD),
    "fractions far from 0": ({"a": [1e6 + i * 1e-3 for i in ROWS]}, Y, CLASSES, UNTOLD),
    "an input twice": ({}, Columns(("a", "a"), ("y",)), CLASSES, "data.input: 'a' is named more than once"),
    "a label twice": ({}, Columns(("a",), ("y", "y")), Targets.LABELS, "data.target: 'y' is named more than once"),
    "next tokens": ({}, Y, Targets.TOKENS, "t.csv is a table; it has no targets of this kind"),
    "no rows": ({"a": [], "y": []}, Y, CLASSES, "t.csv: no rows"),
    "a class in two numbers": ({"y": ["01", "1"] * 20}, Y, CLASSES, "'y': '01' and '1' would be one class"),
    "a class behind a blank": ({"y": [" 1", "1"] * 20}, Y, CLASSES, "would be one class"),
    "a class with a sign": (
        {"y": ["+1", "1", "2", "2"] * 10},
        Y,
        CLASSES,
        "'y' holds double; needed: integers or names",
    ),
    "a truth in two words": ({"y": ["true", "True"] * 20}, Y, CLASSES, "'true' and 'True' would be one class"),
    "a class with a fraction": ({"y": ["1.0", "1"] * 20}, Y, CLASSES, "'y' holds double; needed: integers or names"),
    "a class in two cases": ({"y": ["dog", "Dog"] * 20}, Y, CLASSES, "differ only in writing: 'Dog' and 'dog'"),
    "a class and a blank": ({"y": ["dog ", "dog"] * 20}, Y, CLASSES, "differ only in writing: 'dog' and 'dog '"),
    "a user in two numbers": (
        {"g": ["007", "7"] * 20},
        Columns(("a",), ("y",), "g"),
        CLASSES,
        "'007' and '7' would be one group",
    ),
    "all rows test": ({}, Columns(target=("y",), test=0.99), CLASSES, "40 rows leave none for the training set"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_read_wrongly_is_one_line(tmp_path: Path, kind: str) -> None:
    changes, columns, targets, words = REFUSED[kind]
    with pytest.raises(UserError) as caught:
        load(written(tmp_path, **{**NUMBERS, **changes}), columns=columns, targets=targets)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_in_quotes_may_be_one_that_means_missing_elsewhere(tmp_path: Path) -> None:
    groups = ['"NA"' if i % 2 else "p" for i in ROWS]
    data = load(written(tmp_path, **NUMBERS, g=groups), columns=Columns(("a",), ("y",), "g"))
    assert data.groups == ("NA", "p")


def test_zero_padded_numbers_and_names_that_look_like_numbers_stay_apart(tmp_path: Path) -> None:
    padded = load(
        written(tmp_path, a=[*ROWS], y=["01", "02"] * 20, g=["7", "007", "x", "X"] * 10),
        columns=Columns(("a",), ("y",), "g"),
    )
    assert padded.num_classes == 2
    assert padded.groups == ("007", "7", "X", "x")
    mixed = load(written(tmp_path, a=[*ROWS], y=["01", "1", "one", "2"] * 10), columns=Y)
    assert mixed.num_classes == 4


def test_numbers_of_the_test_file_are_compared_with_those_of_the_training_file(tmp_path: Path) -> None:
    for part, label in (("train", "1"), ("test", "01")):
        rows = [f"{i},{label if i % 2 else 0}" for i in ROWS]
        (tmp_path / f"{part}.csv").write_text("\n".join(["a,y", *rows]) + "\n")
    with pytest.raises(UserError, match="column 'y': '1' and '01' would be one class"):
        load(str(tmp_path), columns=Y)


@pytest.mark.parametrize(("name", "said"), [("", True), ("id", True), ("half", False)])
def test_a_column_that_counts_the_rows_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, said: bool
) -> None:
    numbers: list[object] = [7 + i if said else 0.5 * i for i in ROWS]
    load(written(tmp_path, **{name: numbers, "b": [i % 5 for i in ROWS], "y": NUMBERS["y"]}), columns=Y)
    assert (f"column {name!r} counts the rows, and is an input" in caplog.text) is said


def test_what_is_no_text_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,y\n" + b"".join(b"%d,\xe9\n" % i for i in ROWS))
    with pytest.raises(UserError, match=r"t\.csv: column 'y' holds text that is not UTF-8"):
        load(str(tmp_path / "t.csv"), columns=Y)


@pytest.mark.parametrize("text", [b"a,y\n\xe9,p\n2,q\n", b"\xe9,y\n1,p\n2,q\n"], ids=["input", "name of a column"])
def test_text_of_another_encoding_is_called_that(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(UserError, match=r"t\.csv.* holds text that is not UTF-8; save the file in that encoding"):
        load(str(tmp_path / "t.csv"), columns=Y)


@pytest.mark.parametrize("value", [0.1, 3.3, 1_700_000_001, 1e30])
def test_a_column_without_spread_is_nothing_but_zeros(tmp_path: Path, value: float) -> None:
    data = load(written(tmp_path, a=[value] * 40, b=[*ROWS], y=NUMBERS["y"]), columns=Y)
    inputs, _ = next(data.train.batches(100))
    assert (inputs[:, 0] == 0).all()
    assert inputs[:, 1].std() == pytest.approx(1, abs=1e-5)


def test_times_that_float32_tells_apart_are_taken(tmp_path: Path) -> None:
    days = [1_700_000_000 + 86_400 * i for i in ROWS]
    inputs, _ = next(load(written(tmp_path, a=days, y=NUMBERS["y"]), columns=Y).train.batches(100))
    assert inputs[:, 0].std() == pytest.approx(1, abs=1e-2)
    exact = [2**24 + 2 * i for i in ROWS]
    inputs, _ = next(load(written(tmp_path, a=exact, y=NUMBERS["y"]), columns=Y).train.batches(100))
    assert len(inputs[:, 0].unique()) == len(inputs)


@pytest.mark.parametrize("shape", [(40, 2), (40, 2, 5)])
def test_arrays_beyond_the_precision_of_float32_are_refused(shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(0).normal(size=shape)
    numbers[:, 1] = 1e9 + numbers[:, 1]
    labels = np.arange(40) % 2
    with pytest.raises(UserError, match=r"inputs, feature 1, go from .*: float32 does not tell"):
        Data.of(numbers, labels, test_inputs=numbers, test_targets=labels)
    far = 1e9 + np.arange(40) * 1e-3
    with pytest.raises(UserError, match=r"data: targets go from .*: float32 does not tell"):
        Data.of(np.zeros((40, 1)), far, test_inputs=np.zeros((40, 1)), test_targets=far)


@pytest.mark.parametrize(
    ("values", "targets"), [(["a"] * 40, Targets.CLASSES), ([0.1] * 40, Targets.NUMBERS), ([1] * 40, Targets.LABELS)]
)
def test_targets_that_are_all_the_same_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, values: list[object], targets: Targets
) -> None:
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        data = load(written(tmp_path, a=[*ROWS], y=values), columns=Y, targets=targets)
    assert "all training targets are the same: there is nothing to learn from them" in caplog.text
    assert targets is not Targets.NUMBERS or torch.equal(data.train.labels, torch.zeros(len(data.train)))
