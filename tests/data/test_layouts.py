"""Layouts of data sets as they are published: Hugging Face's, LEAF's, arrays, frames; every file not read is named."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from fl_sim.core.types import UserError
from fl_sim.data import Data, load
from fl_sim.data.kinds import Targets
from fl_sim.data.table import Columns

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))


def png(level: int, size: tuple[int, int] = (8, 8), *, colour: bool = True) -> bytes:
    stream = io.BytesIO()
    pixels = np.full((*size, 3) if colour else size, level, dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def shard(place: Path, count: int, image: str, first: int = 0, **columns: object) -> Path:
    """A parquet file of `count` images, whose level is their number."""
    place.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": png(first + i), "path": None} for i in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({image: pa.array(structs, kind), **columns}), place)
    return place


def read(
    path: Path, caplog: pytest.LogCaptureFixture, targets: Targets = Targets.CLASSES, **asked: object
) -> tuple[Data, list[str]]:
    """The data, and the lines that were logged; without a validation set."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        data = load(str(path), columns=Columns(**asked), targets=targets, validation=0)  # type: ignore[arg-type]
    return data, [record.getMessage().partition("': ")[2] for record in caplog.records]


def cifar100(root: Path) -> None:
    both = {"fine_label": [i % 4 for i in range(20)], "coarse_label": [i % 2 for i in range(20)]}
    for split in ("train", "test"):
        shard(root / "cifar100" / f"{split}-00000-of-00001.parquet", 20, "img", **both)
    (root / "README.md").write_text("a card")


def femnist(root: Path) -> None:
    for number in range(2):
        writers = [f"f{3795 + i % 5:04}_{number:02}" for i in range(20)]
        columns = {"writer_id": writers, "hsf_id": [0] * 20, "character": [i % 4 for i in range(20)]}
        shard(root / "data" / f"train-0000{number}-of-00002.parquet", 20, "image", 20 * number, **columns)


def mnist(root: Path) -> None:
    for split in ("train", "test"):
        shard(root / "mnist" / split / "0000.parquet", 20, "image", label=[i % 4 for i in range(20)])


def tiny_imagenet(root: Path) -> None:
    for split, code in (("train", "1359597a978bc4fa"), ("valid", "70d52db3c749a935")):
        shard(root / "data" / f"{split}-00000-of-00001-{code}.parquet", 20, "image", label=[i % 4 for i in range(20)])


LAYOUTS: Mapping[str, tuple[Callable[[Path], None], dict[str, object], tuple[int, int], list[str]]] = {
    "CIFAR-100": (cifar100, {}, (20, 20), [
        "1 entry of the folder is not read: README.md", "classes are those of column 'fine_label'", "not read: coarse_label",
    ]),
    "CIFAR-100's coarse classes": (cifar100, {"target": ("coarse_label",)}, (20, 20), ["1 entry", "not read: fine_label"]),
    "FEMNIST": (femnist, {"target": ("character",), "group": "writer_id"}, (30, 10), [
        "columns that are not read: hsf_id", "no test files: 0.2 of the samples test (data.test)", "no test samples",
    ]),
    "MNIST": (mnist, {}, (20, 20), []),
    "Tiny-ImageNet": (tiny_imagenet, {}, (20, 20), ["the test set is the split 'valid'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_hugging_faces_layouts_are_read_as_they_lie_there(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, asked, sizes, words = LAYOUTS[name]
    make(tmp_path / "set")
    for _ in ("decoded", "from the cache"):
        data, lines = read(tmp_path / "set", caplog, **asked)
        assert (len(data.train), len(data.test)) == sizes
        assert data.num_classes == (2 if "coarse" in name else 4)
        assert len(lines) == len(words)
        for word, line in zip(words, lines, strict=True):
            assert word in line
    levels = data.train.images[:, 0, 0, 0]
    assert torch.equal(levels % data.num_classes, data.train.labels)
    if asked.get("group"):
        assert len(data.groups) == 10
        assert [data.groups[g] for g in data.train.groups] == [
            f"f{3795 + i % 20 % 5:04}_{i // 20:02}" for i in levels.tolist()
        ]  # type: ignore[union-attr]


def test_wrong_columns_and_several_sets_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    femnist(tmp_path / "set")
    for asked, words in (
        (
            {},
            r"has the columns .*; needed: one of img, image, and one of label, .*; or name them: data.input, data.target",
        ),
        ({"target": ("caracter",)}, "data.target: data/train-.* has no column 'caracter'; did you mean 'character'"),
        (
            {"target": ("character",), "group": "writer"},
            r"data.group: .* has no column 'writer'; did you mean 'writer_id'",
        ),
        ({"target": ("character",), "weight": "hsf_id"}, r"data.weight is for tables \(CSV or parquet files\)"),
    ):
        with pytest.raises(UserError, match=words):
            read(tmp_path / "set", caplog, **asked)
    mnist(tmp_path / "set")
    with pytest.raises(UserError, match="several data sets: data/, mnist/; name one of them"):
        read(tmp_path / "set", caplog)


def folder(root: Path, **classes: list[bytes]) -> Path:
    for name, images in classes.items():
        (root / "train" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            (root / "train" / name / f"{number}.png").write_bytes(image)
    return root


def test_images_of_several_sizes_are_resized_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = [(8, 8), (16, 12), (5, 30)] * 4
    root = folder(tmp_path / "set", cat=[png(90, size) for size in sizes], dog=[png(200, size) for size in sizes])
    with pytest.raises(UserError, match=r"images must have one .*; data\.resize gives them one"):
        read(root, caplog)
    data, lines = read(root, caplog, resize=(8, 10))
    assert data.shape == (3, 8, 10)
    assert set(data.train.images[data.train.labels == 0].unique().tolist()) == {90}
    assert lines == [
        "24 of 24 images are resized to 8 x 10 pixels",
        "no test files: 0.2 of the samples test (data.test)",
    ]
    other, _ = read(root, caplog, resize=(8, 8))
    assert other.shape == (3, 8, 8)
    with pytest.raises(UserError, match=r"data\.resize is for folders of images"):
        load("digits", columns=Columns(resize=(8, 8)))


@pytest.mark.parametrize("first", [True, False])
def test_grey_images_among_colour_ones_are_said(first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(
        tmp_path / "set", cat=[png(9, colour=not first), *[png(3)] * 9], dog=[png(5, colour=first), *[png(5)] * 9]
    )
    data, lines = read(root, caplog)
    assert data.shape == (3, 8, 8)
    assert lines[0] == "1 of 20 images are grey, among colour ones: they get three equal channels"
    for images in (data.train.images, data.test.images):
        assert torch.equal(images[:, 0], images[:, 2])


# -- LEAF --------------------------------------------------------------------------------------------------------------


def leaf(root: Path, x: Callable[[int], object], y: Callable[[int], object], users: int = 3) -> Path:
    for split, count in (("train", 6), ("test", 2)):
        (root / split).mkdir(parents=True, exist_ok=True)
        for half in range(2):
            names = [f"u{user}" for user in range(users) if user % 2 == half]
            data = {name: {"x": [x(i) for i in range(count)], "y": [y(i) for i in range(count)]} for name in names}
            tree = {"users": names, "num_samples": [count] * len(names), "user_data": data}
            (root / split / f"all_data_{half}_niid_0_keep_0_{split}_9.json").write_text(json.dumps(tree))
    return root


def test_large_arrays_are_mapped_and_shared_by_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 3))
    np.save(tmp_path / "x_train.npy", rows)
    np.save(tmp_path / "y_train.npy", np.arange(60) % 2)
    copied = load(str(tmp_path))
    monkeypatch.setattr("fl_sim.data.arrays.LEAST_MAPPED", 0)
    mapped = load(str(tmp_path))
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(mapped, part), getattr(copied, part)
        assert ours.stored.data_ptr() == mapped.train.stored.data_ptr()
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_leafs_femnist_is_images_by_writer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = leaf(tmp_path / "data", lambda i: [(i * 7 + p) % 256 / 255 for p in range(784)], lambda i: i % 2)
    (root / "meta.txt").write_text("")
    data, lines = read(root, caplog)
    assert (data.shape, data.train.stored.dtype, data.num_classes) == ((1, 28, 28), torch.uint8, 2)
    assert data.groups == ("u0", "u1", "u2")
    assert (len(data.train), len(data.test)) == (18, 6)
    assert torch.equal(data.train.images[:, 0, 0, 1].long(), torch.tensor([(i * 7 + 1) % 256 for i in range(6)] * 3))
    assert lines == [
        "1 entry of the folder is not read: meta.txt; read are train/*.json and test/*.json",
        "784 numbers from 0 to 1 a sample are grey images of 28 x 28 pixels",
    ]


@pytest.mark.parametrize("targets", [Targets.TOKENS, Targets.CLASSES])
def test_leafs_shakespeare_is_tokens_by_role(
    targets: Targets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "to be, or not to be"
    data, lines = read(leaf(tmp_path / "data", lambda i: text[i : i + 8], lambda i: text[i + 8]), caplog, targets)
    alphabet = "".join(sorted(set(text[:14])))
    assert (data.vocabulary, data.num_classes, data.targets) == (len(alphabet), len(alphabet), targets)
    decoded = ["".join(alphabet[token] for token in row) for row in data.train.images]
    assert decoded == [text[i : i + 8] for i in range(6)] * 3
    last = data.train.labels if targets is Targets.CLASSES else data.train.labels[:, -1]
    assert [alphabet[token] for token in last] == [text[i + 8] for i in range(6)] * 3
    assert lines[0] == f"texts are {len(alphabet)} characters as tokens, in the order of their codes"


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (lambda i: "abc"[: 1 + i % 3], lambda i: "a", "texts of 1 to 3 characters; needed: one length"),
        (lambda i: "abc", lambda i: "ab", "targets of texts are no single characters"),
        (lambda i: [1.0] * (1 + i % 2), lambda i: 0, "inputs have different lengths"),
        (lambda i: [1.0, "a"], lambda i: 0, "inputs are <U32; needed: numbers, or texts of one length"),
        (lambda i: [1.0, 2.0], lambda i: 0.5, "targets are numbers; needed: classes, or task = 'regression'"),
        (lambda i: [1.0, None], lambda i: 0, "needed: numbers, or texts"),
    ],
)
def test_other_json_is_one_line(
    x: Callable[[int], object], y: Callable[[int], object], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=words):
        read(leaf(tmp_path / "data", x, y), caplog)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "train/a.json: not valid JSON"),
        ("[]", "no `users` and `user_data`"),
        ('{"users": ["u"], "user_data": {}}', "user 'u': needed in user_data: lists x and y of one length"),
        ('{"users": [], "user_data": {"u": 1}}', "user_data of u, who are not in `users`"),
        ('{"users": [], "user_data": {}}', "no samples"),
    ],
)
def test_a_file_that_is_no_leaf_is_one_line(
    text: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "d" / "train").mkdir(parents=True)
    (tmp_path / "d" / "train" / "a.json").write_text(text)
    with pytest.raises(UserError, match=words) as said:
        read(tmp_path / "d", caplog)
    assert "\n" not in str(said.value)


# -- arrays ------------------------------------------------------------------------------------------------------------

X, Y = RNG.normal(size=(30, 4)), np.arange(30) % 3
GREY = RNG.integers(0, 256, (30, 8, 8), dtype=np.uint8)


def _beside(root: Path) -> Path:
    for name, array in {"x_train": X, "y_train": Y, "X_test": X[:9], "Y_test": Y[:9], "notes": X}.items():
        np.save(root / f"{name}.npy", array)
    return root


def _one_file(root: Path) -> Path:
    np.savez_compressed(root / "mnist.npz", x_train=GREY, y_train=Y, x_test=GREY[:9], y_test=Y[:9])
    return root / "mnist.npz"


def _two_files(root: Path) -> Path:
    for split, count in (("train", 30), ("valid", 9)):
        (root / split).mkdir()
        np.savez(root / split / "part.npz", images=np.stack([GREY[:count]] * 3, 3), labels=Y[:count], groups=Y[:count])
    return root


def _tokens(root: Path) -> Path:
    np.savez(root / "set.npz", inputs=np.tile(np.arange(30)[:, None] % 7, 5), targets=Y)
    return root / "set.npz"


ARRAYS: Mapping[str, tuple[Callable[[Path], Path], tuple[int, ...], int, list[str]]] = {
    "npy files": (_beside, (4,), 9, ["1 entry of the folder is not read: notes.npy", "array '' of notes.npy is not read"]),
    "Keras's mnist.npz": (_one_file, (1, 8, 8), 9, ["uint8 inputs (30, 8, 8) are read as images", "uint8 test_inputs (9, 8, 8)"]),
    "npz in folders": (_two_files, (3, 8, 8), 9, ["the split 'valid'", "read as images (N, H, W, channels)", "uint8 test"]),
    "tokens": (_tokens, (5,), 6, ["integer inputs are taken for tokens, 7 of them; a table of numbers is floating-point"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_found_by_their_names(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, shape, tests, words = ARRAYS[name]
    (root := tmp_path / "set").mkdir()
    data, lines = read(make(root), caplog)
    assert (data.shape, len(data.test), data.num_classes) == (shape, tests, 3)
    assert len(data.train) == (24 if name == "tokens" else 30)
    assert len(lines) == len(words), lines
    for word, line in zip(words, lines, strict=True):
        assert word in line
    if name == "npy files":
        assert torch.allclose(next(data.train.batches(30))[0].mean(dim=0), torch.zeros(4), atol=1e-5)
    assert data.groups == (("0", "1", "2") if name == "npz in folders" else ())


def _objects(root: Path) -> None:
    np.save(root / "x_train.npy", np.array([{"a": 1}] * 30, dtype=object), allow_pickle=True)
    np.save(root / "y_train.npy", Y)


def _huge(root: Path) -> None:
    """A header of terabytes."""
    with (root / "x_train.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 4)})
    np.save(root / "y_train.npy", Y)


def _bomb(root: Path) -> None:
    """A member that says less than it expands to."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(root / "train.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", head.getvalue())


def _missing(root: Path) -> None:
    np.save(root / "x_train.npy", X)


def _twice(root: Path) -> None:
    for name in ("x_train", "train_inputs"):
        np.save(root / f"{name}.npy", X)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_objects, "x_train.npy: unreadable arrays: Python objects, which are never unpickled"),
        (_huge, r"x_train.npy: unreadable arrays: float32 \(1099511627776, 4\) in"),
        (_bomb, r"train.npz: unreadable arrays: float32 \(1099511627776,\) in"),
        (_missing, "no train targets; needed: train.npz and test.npz with inputs and targets"),
        (_twice, "train_inputs are there twice, the second time in x_train.npy"),
    ],
)
def test_wrong_arrays_are_one_line(
    make: Callable[[Path], None], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "set").mkdir()
    make(tmp_path / "set")
    with pytest.raises(UserError, match=words):
        read(tmp_path / "set", caplog)


# -- frames and shorthands of Data.of ----------------------------------------------------------------------------------

FRAME = pd.DataFrame(
    {
        "age": RNG.integers(1, 9, 60),
        "weight": RNG.normal(size=60),
        "kind": np.array(["cat", "dog"])[np.arange(60) % 2],
        "site": np.array(["a", "b", "c"])[np.arange(60) % 3],
        "score": RNG.normal(size=60),
        "trust": 1.0 + np.arange(60),
    },
    index=pd.Index(range(100, 160), name="row"),
)


class Elsewhere:
    """A frame of another library, known by Arrow's protocol alone, as polars' are."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.table = pa.Table.from_pandas(frame, preserve_index=False)
        self.columns = self.table.column_names

    def __arrow_c_stream__(self, requested: object = None) -> object:
        return self.table.__arrow_c_stream__(requested)


@pytest.mark.parametrize("as_given", [lambda frame: frame, Elsewhere, lambda frame: Elsewhere(frame).table])
def test_a_frame_is_read_by_its_columns(as_given: Callable[[object], object], caplog: pytest.LogCaptureFixture) -> None:
    frame = FRAME.drop(columns="score")
    data = Data.of(as_given(frame), "kind", groups="site", weights="trust", validation=0)
    assert (data.shape, data.num_classes, data.groups, len(data.test)) == ((2,), 2, ("a", "b", "c"), 12)
    assert [record.getMessage() for record in caplog.records] == ["data: classes, from 0: cat, dog"]
    for row, kind, group, weight in zip(
        data.train.images, data.train.labels, data.train.groups, data.train.weights, strict=True
    ):  # type: ignore[arg-type]
        (at,) = np.flatnonzero(np.float32(frame["weight"]) == float(row[1]))
        one = frame.iloc[at]
        assert (row[0], ("cat", "dog")[kind], data.groups[group]) == (one["age"], one["kind"], one["site"])
        assert float(weight) == pytest.approx(one["trust"] / frame["trust"].mean(), rel=0.1)
    tested = Data.of(as_given(frame[:40]), "kind", test_inputs=as_given(frame[40:]), groups="site", validation=0)
    assert (len(tested.train), len(tested.test), tested.shape) == (40, 20, (3,))
    assert Data.of(as_given(FRAME[["age", "weight"]]), FRAME["score"], validation=0).targets is Targets.NUMBERS
    assert Data.of(as_given(FRAME[["age", "score"]]), "score").targets is Targets.NUMBERS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"weight": np.where(np.arange(60) == 7, np.nan, 1.0)},
            "the frame: column 'weight': 1 values are missing, the first in row 7 .from 0.",
        ),
        ({"age": [1, "two", 3] * 20}, "data: the frame: .*; needed: one type in a column"),
        (
            {"age": ["1", "two", "3"] * 20},
            "column 'age' holds text, for instance 'two' in row 1 .from 0.; needed: numbers",
        ),
        (
            {"weight": np.where(np.arange(60) == 7, np.inf, 1.0)},
            "column 'weight' holds NaN or infinity, first in row 7 .from 0.",
        ),
        ({"kind": None}, "column 'kind'"),
        ({"day": pd.Timestamp("2020-01-01")}, r"column 'day' holds timestamp.*; needed: numbers"),
    ],
)
def test_a_wrong_frame_is_one_line(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as said:
        Data.of(FRAME.assign(**change).drop(columns=["site", "score"]), "kind")
    assert "\n" not in str(said.value)


def test_wrong_columns_of_a_frame_are_one_line() -> None:
    with pytest.raises(UserError, match="data: targets: the frame has no column 'kin'; did you mean 'kind'"):
        Data.of(FRAME, "kin")
    with pytest.raises(UserError, match="data: groups: the frame has no column 'place'"):
        Data.of(FRAME, "kind", groups="place")
    with pytest.raises(UserError, match="data: inputs: the frame has no column 'age'"):
        Data.of(FRAME.drop(columns=["site", "score"]), "kind", test_inputs=FRAME[["weight", "kind", "trust"]])


def test_tokens_without_targets_are_sequences_whose_next_tokens_are_learnt() -> None:
    tokens = (np.arange(40)[:, None] + np.arange(9)) % 10
    data = Data.of(tokens, validation=0)
    assert (len(data.train), len(data.test), data.shape, data.vocabulary) == (32, 8, (8,), 10)
    assert torch.equal(data.train.images[:, 1:], data.train.labels[:, :-1])
    given = Data.of(tokens[:30], test_inputs=tokens[30:], validation=0)
    assert (len(given.train), len(given.test)) == (30, 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Data.of(X), r"inputs are float64 \(30, 4\) and there are no targets; needed: targets, or tokens"),
        (lambda: Data.of(X, Y[:7]), "data: 30 inputs, 7 targets; needed: as many of each"),
        (lambda: Data.of(X, Y, test_targets=Y), "test_targets without test_inputs; needed: both, or neither"),
        (lambda: Data.of(X, Y, test_inputs=X, test_targets=Y, test=0.1), "test = 0.1, and test_inputs are given"),
        (lambda: Data.of(X, "kind"), "data: targets are a str; needed: an array or a frame"),
        (lambda: Data.of(object(), Y), "data: inputs are a object; needed: an array or a frame"),
        (lambda: Data.of(X, Y, test=1.5), "test = 1.5; needed: a share between 0 and 1"),
    ],
)
def test_half_a_data_set_is_one_line(make: Callable[[], Data], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


class Pairs(Dataset[tuple[object, object]]):
    def __init__(self, inputs: Sequence[object], targets: Sequence[object]) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> tuple[object, object]:
        return self.inputs[number], self.targets[number]


def test_a_dataset_of_pytorch_is_read_once() -> None:
    tensors = Data.of(Pairs(torch.from_numpy(X).float(), Y.tolist()), validation=0)  # type: ignore[arg-type]
    assert (tensors.shape, tensors.num_classes, len(tensors.train), len(tensors.test)) == ((4,), 3, 24, 6)
    pictures = [Image.fromarray(image) for image in GREY]
    data = Data.of(Pairs(pictures[:20], Y.tolist()), test_inputs=Pairs(pictures[20:], Y.tolist()), validation=0)
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(GREY[:20]))
    assert len(data.test) == 10
    colour = Data.of(Pairs([Image.new("RGB", (6, 5))] * 30, Y.tolist()))
    assert colour.shape == (3, 5, 6)
    with pytest.raises(UserError, match=r"sample 20 of the Dataset raised IndexError: .*"):
        Data.of(Pairs(list(X), Y[:20].tolist()))
    with pytest.raises(UserError, match=r"inputs have the shapes \(2,\), \(4,\); needed: one shape"):
        Data.of(Pairs([*X[:29], X[0][:2]], Y.tolist()))
