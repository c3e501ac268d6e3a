"""Tables, tokens and groups: read as they are meant, or refused in one line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fl_sim.core.types import UserError
from fl_sim.data import Data, load, partition
from fl_sim.data.kinds import Targets
from fl_sim.data.table import Columns
from fl_sim.data.text import characters, roles

ROWS = 60
RNG = np.random.default_rng(0)
GOOD: Mapping[str, object] = {
    "age": RNG.integers(20, 80, ROWS),
    "weight": RNG.normal(70, 10, ROWS).round(3),
    "site": np.array(["north", "south", "west"])[np.arange(ROWS) % 3],
    "kind": np.array(["cat", "dog"])[np.arange(ROWS) % 2],
    "score": RNG.normal(0, 5, ROWS).round(3),
    "tall": np.arange(ROWS) % 2,
    "old": (np.arange(ROWS) // 2) % 2,
}


def written(folder: Path, name: str, **changes: object) -> Path:
    """A table in the format of its name."""
    columns = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))


BY_KIND = Columns(input=("age", "weight"), target=("kind",), group="site")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_is_normalised_and_its_classes_and_groups_are_numbered(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        data = load(str(written(tmp_path, f"t.{suffix}")), columns=BY_KIND)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "classes of column 'kind', from 0: cat, dog"
    ]
    assert (data.shape, data.num_classes, data.groups) == ((2,), 2, ("north", "south", "west"))
    assert (len(data.train), len(data.validation), len(data.test)) == (42, 6, 12)
    inputs = next(data.train.batches(100))[0]
    assert torch.allclose(inputs.mean(dim=0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(inputs.std(dim=0), torch.ones(2), atol=1e-5)
    every = {tuple(row) for row in np.stack([GOOD["age"], GOOD["weight"]], axis=1).astype(np.float32)}  # type: ignore[call-overload]
    for split in (data.train, data.validation, data.test):
        for row, kind, group in zip(split.images.numpy(), split.labels, split.groups, strict=True):  # type: ignore[arg-type]
            at = next(i for i in range(ROWS) if tuple(row) == (GOOD["age"][i], np.float32(GOOD["weight"][i])))  # type: ignore[index]
            assert GOOD["kind"][at] == ("cat", "dog")[kind]  # type: ignore[index]
            assert GOOD["site"][at] == data.groups[group]  # type: ignore[index]
            assert tuple(row) in every
    assert data.train.stored.data_ptr() == data.train.subset(np.arange(3)).stored.data_ptr()


def test_a_large_table_stays_in_its_mapped_file_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(written(tmp_path, "t.parquet"))
    copied = load(path, columns=BY_KIND, proxy=0.1)
    monkeypatch.setattr("fl_sim.data.arrays.LEAST_MAPPED", 0)
    mapped = load(path, columns=BY_KIND, proxy=0.1)
    assert torch.equal(mapped.train.mean, copied.train.mean)  # type: ignore[arg-type]
    assert torch.equal(mapped.train.std, copied.train.std)  # type: ignore[arg-type]
    for part in ("train", "validation", "test", "proxy"):
        ours, theirs = getattr(mapped, part), getattr(copied, part)
        assert ours.stored.data_ptr() == mapped.train.stored.data_ptr()
        assert len(ours.stored) == ROWS
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.groups, theirs.groups)
        for one, other in zip(ours.batches(7), theirs.batches(7), strict=True):
            assert torch.equal(one[0], other[0])
    monkeypatch.setattr("fl_sim.data.dataset.BLOCK", 1)
    apart = load(path, columns=BY_KIND, proxy=0.1)
    torch.testing.assert_close(apart.train.std, copied.train.std)


def test_numbers_and_several_labels_are_targets_too(tmp_path: Path) -> None:
    path = str(written(tmp_path, "t.csv"))
    numbers = load(path, columns=Columns(("age",), ("score",)), targets=Targets.NUMBERS)
    assert (numbers.targets, numbers.num_classes) == (Targets.NUMBERS, 1)
    labels = load(path, columns=Columns(("age",), ("tall", "old")), targets=Targets.LABELS)
    assert (labels.targets, labels.num_classes) == (Targets.LABELS, 2)


def test_a_folder_has_its_own_test_rows(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder, "train.csv")
    written(folder, "test.parquet", kind=np.array(["dog"] * ROWS))
    data = load(str(folder), columns=BY_KIND)
    assert (len(data.train) + len(data.validation), len(data.test)) == (ROWS, ROWS)
    assert data.test.labels.tolist() == [1] * ROWS


def test_the_rest_are_inputs_where_none_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", site=None)
    assert load(str(path), columns=Columns(target=("kind",))).shape == (5,)


MISSING = np.where(np.arange(ROWS) == 7, np.nan, GOOD["age"])
MIXED = np.where(np.arange(ROWS) == 9, "unknown", GOOD["age"])
WRONG: Mapping[str, tuple[Mapping[str, object], Columns, str]] = {
    "no target": ({}, Columns(), "data.target is not set: t.csv has the columns age, weight, site"),
    "no such target": ({}, Columns(target=("knd",)), "data.target: t.csv has no column 'knd'; did you mean 'kind'?"),
    "no such input": ({}, Columns(("agee",), ("kind",)), "data.input: t.csv has no column 'agee'; did you mean 'age'?"),
    "no such group": ({}, Columns(("age",), ("kind",), "user"), "data.group: t.csv has no column 'user'"),
    "the target as input": ({}, Columns(("age", "kind"), ("kind",)), "data.input: 'kind' is data.target too"),
    "missing": ({"age": MISSING}, BY_KIND, "column 'age': 1 values are missing, the first in row 7 (from 0)"),
    "mixed": ({"age": MIXED}, BY_KIND, "column 'age' holds text, for instance 'unknown' in row 9 (from 0); needed: numbers"),
    "infinite": ({"age": [1e300] * ROWS}, BY_KIND, "column 'age' holds NaN or infinity, first in row 0 (from 0)"),
    "fractions as classes": ({}, Columns(("age",), ("score",)), "column 'score' holds double; needed: integers or names"),
    "two classes": ({}, Columns(("age",), ("kind", "tall")), "a classification has one; task = 'multilabel' has several"),
    "too few rows": ({k: v[:2] for k, v in GOOD.items()}, BY_KIND, "2 rows leave none for the test set"),  # type: ignore[index]
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_table_is_one_line(tmp_path: Path, kind: str) -> None:
    changes, columns, words = WRONG[kind]
    path = written(tmp_path, "t.csv", **changes)
    with pytest.raises(UserError) as caught:
        load(str(path), columns=columns)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_of_a_test_file_are_taken_by_name(tmp_path: Path, suffix: str) -> None:
    """Two folders, of which one has the test file's columns in another order, hold the same data."""
    folders = [tmp_path / "same", tmp_path / "other"]
    for folder, order in zip(folders, (GOOD, reversed(GOOD)), strict=True):
        folder.mkdir()
        written(folder, f"train.{suffix}")
        columns = {key: GOOD[key] for key in order}
        path = folder / f"test.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table(columns), path)
        else:
            rows = zip(*columns.values(), strict=True)
            path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    same, other = (load(str(folder), columns=Columns(target=("kind",), group="site")) for folder in folders)
    assert torch.equal(same.test.images, other.test.images)
    assert torch.equal(same.test.labels, other.test.labels)


def test_columns_that_one_file_lacks_are_named(tmp_path: Path) -> None:
    written(tmp_path, "train.csv")
    for change, words in (
        ({"age": None}, "test.csv lacks columns of train.csv: age"),
        ({"size": GOOD["age"]}, "test.csv has columns that train.csv lacks: size"),
    ):
        written(tmp_path, "test.csv", **change)
        with pytest.raises(UserError, match=words):
            load(str(tmp_path), columns=Columns(target=("kind",), group="site"))
    assert load(str(tmp_path), columns=BY_KIND).shape == (2,)


@pytest.mark.parametrize(
    "columns",
    [BY_KIND, Columns(test=0.5), Columns(context=8), Columns(resize=(8, 8))],
    ids=["target", "test", "context", "resize"],
)
@pytest.mark.parametrize("source", ["nosuch.csv", "nofolder/x.parquet", "nofolder"])
def test_a_source_that_is_not_there_is_said_whatever_is_asked_of_it(source: str, columns: Columns) -> None:
    with pytest.raises(UserError, match="no such folder or file"):
        load(source, columns=columns)


def test_the_first_sample_without_a_number_is_that_of_the_array_that_was_given() -> None:
    numbers = np.zeros((60, 2))
    numbers[3, 1] = np.nan
    for inputs, targets, name in (
        (numbers, np.arange(60) % 2, "inputs"),
        (np.zeros((60, 2)), numbers[:, 1], "targets"),
    ):
        with pytest.raises(UserError, match=rf"data: {name} hold NaN or infinity, first in sample 3 \(from 0\)"):
            Data.of(inputs, targets)


def test_columns_are_for_tables() -> None:
    for source, columns, words in (
        ("digits", Columns(target=("x",)), "data.target is for tables (CSV or parquet files)"),
        ("wine", Columns(context=8), "data.context is for texts"),
        ("coriolanus", Columns(test=0.5), "data.test is for tables"),
    ):
        with pytest.raises(UserError) as caught:
            load(source, columns=columns)
        assert words in str(caught.value)


# -- tokens and text ---------------------------------------------------------------------------------------------------


def test_text_is_cut_by_role_and_each_target_is_the_next_character() -> None:
    data = load("coriolanus", quiet=True)
    alphabet, spoken = characters("coriolanus"), roles("coriolanus")
    assert (data.shape, data.num_classes, data.vocabulary, len(data.groups)) == ((64,), 60, 60, 32)
    for split in (data.train, data.test):
        for at in (0, len(split) // 2, len(split) - 1):
            shown = "".join(alphabet[token] for token in split.images[at])
            following = "".join(alphabet[token] for token in split.labels[at])
            assert shown[1:] == following[:-1]
            assert shown + following[-1] in spoken[data.groups[split.groups[at]]]  # type: ignore[index]
    assert set(data.test.groups.tolist()) == set(range(32))  # type: ignore[union-attr]


def of_tokens(**changes: object) -> Data:
    tokens = np.arange(40).reshape(10, 4) % 6
    given = {"inputs": tokens, "targets": tokens, "test_inputs": tokens[:3], "test_targets": tokens[:3]}
    return Data.of(**{**given, "vocabulary": 6, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"vocabulary": 5},
            "data: targets: token 5 in sample 1 (from 0) is beyond the vocabulary of 5; allowed: 0 to 4",
        ),
        (
            {"test_inputs": np.full((3, 4), 6)},
            "test_inputs: token 6 in sample 0 (from 0) is beyond the vocabulary of 6",
        ),
        (
            {"targets": np.arange(10) % 2, "test_targets": np.arange(3) % 2, "vocabulary": None},
            "vocabulary is not given",
        ),
        ({"standardise": True}, "standardise = True, but inputs are tokens"),
        ({"groups": np.zeros(4)}, "groups are float64 (4,); needed: an integer or a name for each of 10"),
    ],
)
def test_wrong_tokens_are_one_line(changes: Mapping[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        of_tokens(**changes)
    assert words in str(caught.value)


# -- groups ------------------------------------------------------------------------------------------------------------


def test_a_natural_partition_keeps_groups_whole() -> None:
    groups = RNG.integers(0, 12, 300)
    labels = np.zeros(300, dtype=np.int64)
    each = partition(labels, 12, kind="natural", groups=groups)
    assert [set(groups[part]) for part in each] == [{number} for number in range(12)]
    dealt = partition(labels, 5, kind="natural", groups=groups, seed=1)
    assert sorted(group for part in dealt for group in set(groups[part])) == list(range(12))
    assert sorted(len(set(groups[part])) for part in dealt) == [2, 2, 2, 3, 3]
    with pytest.raises(UserError, match=r"12 groups for data.clients = 13"):
        partition(labels, 13, kind="natural", groups=groups)
    with pytest.raises(UserError, match=r"the data have no groups; set data\.group"):
        partition(labels, 13, kind="natural")


def test_targets_that_are_no_classes_partition_by_number_alone() -> None:
    numbers = RNG.normal(size=300).astype(np.float32)
    parts = partition(numbers, 7, kind="quantity")  # type: ignore[arg-type]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(300))
    with pytest.raises(
        UserError, match=r"is by class, and targets are float32 \(300,\); allowed: iid, quantity, natural"
    ):
        partition(numbers, 7, kind="dirichlet")  # type: ignore[arg-type]


def shared(labels: np.ndarray, request: object) -> list[np.ndarray]:
    return [np.arange(10), np.arange(5, 15)]


def test_parts_overlap_where_that_is_asked_for() -> None:
    labels, path = np.zeros(20, dtype=np.int64), f"{__name__}:shared"
    assert [len(part) for part in partition(labels, 2, kind=path, overlap=True)] == [10, 10]
    with pytest.raises(UserError, match=r"or data\.overlap = true"):
        partition(labels, 2, kind=path)
    with pytest.raises(UserError, match="'iid' never overlaps"):
        partition(labels, 2, kind="iid", overlap=True)
