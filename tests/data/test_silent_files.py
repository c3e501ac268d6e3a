"""Data folders: every file is read as it is meant, named in the log, or refused by name."""

from __future__ import annotations

import io
import json
import logging
import os
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fl_sim.core.types import UserError
from fl_sim.data import Data, load
from fl_sim.data.pictures import scaled

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(level: int = 0) -> bytes:
    return encoded(Image.fromarray(RAMP + np.uint8(level)))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """train/ of 20 cats and 20 dogs, test/ of 5 and 5; no two images alike."""
    root = tmp_path / "pets"
    number = 0
    for part, count in (("train", 20), ("test", 5)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for _ in range(count):
                (root / part / label / f"img_{number:03}.png").write_bytes(grey(number))
                number += 1
    return root


def rows(
    place: Path, images: list[bytes | None], labels: object = None, *, label: str = "label", **more: object
) -> None:
    structs = [None if data is None else {"bytes": data, "path": None} for data in images]
    classes = [i % 2 for i in range(len(images))] if labels is None else labels
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(structs, kind), label: classes, **more}), place)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A parquet folder: 40 training and 10 test images."""
    root = tmp_path / "table"
    root.mkdir()
    rows(root / "train-0.parquet", [grey(i) for i in range(40)])
    rows(root / "test-0.parquet", [grey(100 + i) for i in range(10)])
    return root


def refused(root: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(str(root))
    said = str(caught.value)
    assert "\n" not in said
    assert "0x" not in said, "an address is no name"
    for word in ("data.source", *words):
        assert word in said


class Log:
    """The lines that are logged while it is entered."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog

    def of(self, root: Path) -> tuple[Data, list[str]]:
        self.caplog.clear()
        with self.caplog.at_level(logging.WARNING, logger="fl_sim"):
            data = load(str(root), validation=0.2)
        return data, [record.getMessage() for record in self.caplog.records]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    return Log(caplog)


def sizes(data: Data) -> tuple[list[int], list[int]]:
    """Training (and validation) and test samples by class."""
    train = data.train.labels.bincount(minlength=2) + data.validation.labels.bincount(minlength=2)
    return train.tolist(), data.test.labels.bincount(minlength=2).tolist()


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_clean_folder_is_read_without_a_word(pets: Path, table: Path, log: Log) -> None:
    data, lines = log.of(pets)
    assert (sizes(data), lines) == (([20, 20], [5, 5]), [])
    data, lines = log.of(table)
    assert (sizes(data), lines) == (([20, 20], [5, 5]), [])


def test_a_moved_image_is_seen_by_the_cache(pets: Path, log: Log) -> None:
    log.of(pets)
    (pets / "train/cat/img_019.png").rename(pets / "train/dog/img_019.png")  # the order of the names stays
    assert sizes(log.of(pets)[0]) == ([19, 21], [5, 5])
    (pets / "train/dog/img_039.png").rename(pets / "test/cat/img_039.png")
    assert sizes(log.of(pets)[0]) == ([19, 20], [6, 5])
    (pets / "train/dog").rename(pets / "train/elk")
    (pets / "test/dog").rename(pets / "test/elk")
    assert sizes(log.of(pets)[0]) == ([19, 20], [6, 5])


def _checkpoints(root: Path) -> None:
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "train/.ipynb_checkpoints/img_000.png").write_bytes(grey())


def _hidden_images(root: Path) -> None:
    (root / "train/cat/._img_000.png").write_bytes(b"\0\5\x16\7")


def _system_files(root: Path) -> None:
    for name in (".DS_Store", "train/cat/Thumbs.db", "test/dog/desktop.ini"):
        (root / name).write_bytes(b"x")


def _other_suffixes(root: Path) -> None:
    for number in range(8):
        (root / f"train/cat/img_{number:03}.png").rename(root / f"train/cat/img_{number:03}.webp")


PASSED_OVER: Mapping[str, tuple[Callable[[Path], None], list[str]]] = {
    "a hidden folder": (_checkpoints, ["1 entry", "train/.ipynb_checkpoints/"]),
    "an empty hidden folder": (lambda root: (root / "train/.ipynb_checkpoints").mkdir(), ["train/.ipynb_checkpoints/"]),
    "an empty class that sorts first": (lambda root: (root / "train/ape").mkdir(), ["1 entry", "train/ape/"]),
    "an empty class that sorts last": (lambda root: (root / "test/wolf").mkdir(), ["1 entry", "test/wolf/"]),
    "hidden images": (_hidden_images, ["train/cat/._img_000.png"]),
    "files of the system": (_system_files, ["3 entries", ".DS_Store", "train/cat/Thumbs.db", "test/dog/desktop.ini"]),
    "a folder in a class": (lambda root: (root / "train/cat/old.png").mkdir(), ["1 entry", "train/cat/old.png/"]),
    "an image beside the classes": (lambda root: (root / "train/x.png").write_bytes(grey()), ["train/x.png"]),
    "another part": (lambda root: (root / "val").mkdir(), ["val/"]),
    "a name of two lines": (lambda root: (root / "a\nb").mkdir(), [r"'a\nb/'"]),
    "a name of no encoding": (lambda root: (root / os.fsdecode(b"\xff.txt")).write_bytes(b""), [r"\udcff.txt"]),
}


@pytest.mark.parametrize("kind", PASSED_OVER)
def test_what_is_not_read_is_named_in_one_line_each_time(pets: Path, log: Log, kind: str) -> None:
    spoil, words = PASSED_OVER[kind]
    spoil(pets)
    for _ in ("decoded", "from the cache"):
        data, lines = log.of(pets)
        assert sizes(data) == ([20, 20], [5, 5])
        assert data.num_classes == 2
        (line,) = lines
        assert "\n" not in line
        for word in ("data.source", "not read", *words):
            assert word in line


def test_images_of_another_suffix_are_counted(pets: Path, log: Log) -> None:
    _other_suffixes(pets)
    data, (line,) = log.of(pets)
    assert sizes(data) == ([12, 20], [5, 5])
    assert "8 entries of the folder are not read: train/cat/img_000.webp" in line
    assert "and 3 more; read are" in line


def _renamed(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        for old, new in pairs:
            (root / new).parent.mkdir(parents=True, exist_ok=True)
            (root / old).rename(root / new)

    return spoil


def _one_more(part: str, label: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / part / label).mkdir()
        (root / part / label / "x.png").write_bytes(grey())

    return spoil


def _all_tif(root: Path) -> None:
    for path in sorted((root / "train/dog").iterdir()):
        path.rename(path.with_suffix(".tif"))


def _composed(root: Path) -> None:
    for part, form in (("train", "NFC"), ("test", "NFD")):
        (root / part / "cat").rename(root / part / unicodedata.normalize(form, "bär"))


REFUSED_FOLDERS: Mapping[str, tuple[Callable[[Path], None], list[str]]] = {
    "another case": (_renamed(("test/dog", "test/Dog")), ["only in train/: 'dog'", "only in test/: 'Dog'"]),
    "an extra class": (_one_more("test", "wolf"), ["only in test/: 'wolf'"]),
    "a class less": (_one_more("train", "wolf"), ["only in train/: 'wolf'"]),
    "two Unicode forms": (_composed, ["'b\\xe4r'", "'ba\\u0308r'"]),
    "two cases in one part": (_one_more("train", "Dog"), ["differ only in writing: 'Dog' and 'dog'"]),
    "a space at the end": (_one_more("train", "dog "), ["'dog'", "'dog '"]),
    "a class of .tif": (_all_tif, ["no images in train/dog/", "train/dog/img_020.tif", "and 15 more", ".png"]),
    "nested folders": (
        _renamed(("train/dog", "train/dog_/images"), ("train/dog_", "train/dog")),
        ["train/dog/images/"],
    ),
    "other classes to validate": (
        _renamed(("test/dog", "test/wolf"), ("test", "val")),
        ["val/ have other classes", "in val/: 'wolf'"],
    ),
    "Train/": (_renamed(("train", "Train"), ("test", "Test")), ["no file train-*.parquet", "there: Test/, Train/"]),
    "a broken link": (lambda root: (root / "train/cat/x.png").symlink_to("nowhere"), ["train/cat/x.png"]),
    "a pipe": (lambda root: os.mkfifo(root / "train/cat/x.png"), ["not a plain file", "train/cat/x.png"]),
}


@pytest.mark.parametrize("kind", REFUSED_FOLDERS)
def test_other_folders_are_refused_by_name(pets: Path, kind: str) -> None:
    spoil, words = REFUSED_FOLDERS[kind]
    spoil(pets)
    refused(pets, *words)


def test_a_file_is_no_folder_and_a_tilde_is_the_home(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pets / "x.npz").write_bytes(b"")
    refused(pets / "x.npz", "x.npz: unreadable arrays: File is not a zip file")
    (pets / "x.txt").write_bytes(b"")
    refused(pets / "x.txt", "is a file, not a folder")
    monkeypatch.setenv("HOME", str(pets.parent))
    assert load("~/pets").num_classes == 2
    refused(Path("~nobody_here/pets"), "no such folder")


def test_a_folder_with_the_name_of_a_data_set_is_said(pets: Path, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    pets.rename(pets.with_name("digits"))
    monkeypatch.chdir(pets.parent)
    data, (line,) = log.of(Path("digits"))
    assert data.num_classes == 2
    assert "the folder of this name is read, not the data set" in line


# -- images ------------------------------------------------------------------------------------------------------------


def _sixteen_bits(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    return encoded(Image.fromarray(pixels.astype(np.uint16)), kind)


def _wide_rgb() -> bytes:
    """A PNG of 16 bits for each of three channels, which Pillow opens as RGB of 8."""
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    head = (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    lines = b"".join(b"\0" + np.repeat(row.astype(">u2") * 16, 3).tobytes() for row in RAMP)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _drawn_in_alpha(mode: str) -> bytes:
    image = Image.new(mode, (8, 8))
    image.putalpha(Image.fromarray(RAMP))
    return encoded(image)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(RAMP), "JPEG", exif=exif)


def _animated() -> bytes:
    first, second = (Image.fromarray(RAMP + np.uint8(i)) for i in range(2))
    return encoded(first, save_all=True, append_images=[second])


def _palette(*, transparent: bool) -> bytes:
    image = Image.fromarray(np.stack([RAMP] * 3, 2)).quantize(16)
    return encoded(image, transparency=3) if transparent else encoded(image)


REFUSED_IMAGES: Mapping[str, tuple[Callable[[], bytes | None], str]] = {
    "12 of 16 bits": (lambda: _sixteen_bits(RAMP.astype(np.uint16) * 16), "use 12 of the 16 bits (largest pixel 40"),
    "8 of 16 bits, big-endian": (
        lambda: encoded(Image.frombytes("I;16B", (8, 8), RAMP.astype(">u2").tobytes()), "TIFF"),
        "use 8 of the 16 bits",
    ),
    "16 bits of black": (lambda: _sixteen_bits(RAMP * 0), "use 0 of the 16 bits"),
    "16-bit grey, white is 0": (
        lambda: encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF", tiffinfo={262: 0}),
        "whose white is 0",
    ),
    "16-bit RGB": (_wide_rgb, "16 bits a channel"),
    "32-bit": (lambda: encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "mode I;"),
    "fractions": (lambda: encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"), "mode F;"),
    "RGBA": (lambda: _drawn_in_alpha("RGB"), "transparent pixels"),
    "LA": (lambda: _drawn_in_alpha("L"), "transparent pixels"),
    "a palette with transparency": (lambda: _palette(transparent=True), "transparent pixels"),
    "a transparent colour": (lambda: encoded(Image.fromarray(RAMP), transparency=8), "transparent pixels"),
    "CMYK": (lambda: encoded(Image.new("CMYK", (8, 8)), "JPEG"), "mode CMYK"),
    "Lab": (lambda: encoded(Image.new("LAB", (8, 8)), "TIFF"), "mode LAB"),
    "an animation": (_animated, "several pictures"),
    "two pages": (
        lambda: encoded(Image.fromarray(RAMP), "TIFF", save_all=True, append_images=[Image.fromarray(RAMP)]),
        "several pictures",
    ),
    "turned by EXIF": (_turned, "EXIF orientation 6"),
    "nothing": (lambda: b"", "0 bytes"),
    "no image": (lambda: b"GIF is not what this is", "no image that is known here"),
    "cut": (lambda: encoded(Image.fromarray(RAMP), "JPEG")[:-40], "cannot be decoded"),
    "missing": (lambda: None, "missing"),
}


WIDE_IMAGES: Mapping[str, Callable[[], bytes]] = {
    "PNG": lambda: _sixteen_bits(RAMP.astype(np.uint16) * 257),
    "TIFF": lambda: _sixteen_bits(RAMP.astype(np.uint16) * 257, "TIFF"),
    "big-endian TIFF": lambda: encoded(
        Image.frombytes("I;16B", (8, 8), (RAMP.astype(">u2") * np.uint16(257)).astype(">u2").tobytes()), "TIFF"
    ),
}


@pytest.mark.parametrize("kind", WIDE_IMAGES)
def test_16_bit_grey_is_the_8_bit_image_that_it_was_made_from(table: Path, kind: str) -> None:
    images: list[bytes | None] = [grey(i) for i in range(40)]
    rows(table / "train-0.parquet", [encoded(Image.fromarray(RAMP)), *images[1:]])
    eight = load(str(table), validation=0.1).train.images
    rows(table / "train-0.parquet", [WIDE_IMAGES[kind](), *images[1:]])
    assert torch.equal(load(str(table), validation=0.1).train.images, eight)


def test_every_16_bit_value_is_rounded_to_the_nearest_of_8() -> None:
    wide = np.arange(1 << 16, dtype=np.uint16)
    assert np.array_equal(scaled(wide), np.round(wide / 257).astype(np.uint8))


@pytest.mark.parametrize("kind", REFUSED_IMAGES)
@pytest.mark.parametrize("row", [0, 30])
def test_an_image_of_another_kind_is_refused_with_its_file_and_row(table: Path, kind: str, row: int) -> None:
    make, words = REFUSED_IMAGES[kind]
    for number in range(2):
        images: list[bytes | None] = [grey(i) for i in range(40)]
        if number == 1:
            images[row] = make()
        rows(table / f"train-{number}.parquet", images)
    refused(table, f"train-1.parquet, row {row}: ", words)


@pytest.mark.parametrize("kind", [kind for kind, (make, _) in REFUSED_IMAGES.items() if make() is not None])
def test_and_with_its_path(pets: Path, kind: str) -> None:
    make, words = REFUSED_IMAGES[kind]
    (pets / "test/dog/img_999.png").write_bytes(make() or b"")
    refused(pets, "test/dog/img_999.png: ", words)


def test_an_image_of_another_size_is_named_with_the_first(pets: Path) -> None:
    (pets / "train/dog/img_999.png").write_bytes(encoded(Image.new("L", (9, 8))))
    refused(pets, "train/cat/img_000.png has (1, 8, 8)", "train/dog/img_999.png has (1, 8, 9)")


READ_IMAGES: Mapping[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "1 bit": (lambda: encoded(Image.fromarray(RAMP > 100)), (RAMP > 100)[None] * np.uint8(255)),
    "opaque LA": (lambda: encoded(Image.fromarray(RAMP).convert("LA")), RAMP[None]),
    "opaque RGBA": (lambda: encoded(Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP.T], 2)).convert("RGBA")),
                    np.stack([RAMP, RAMP[::-1], RAMP.T])),
    "a palette": (lambda: encoded(Image.fromarray(np.stack([RAMP // 128 * 255] * 3, 2)).quantize(2)),
                  np.stack([RAMP // 128 * 255] * 3)),
    "TIFF": (lambda: encoded(Image.fromarray(RAMP), "TIFF"), RAMP[None]),
    "WebP": (lambda: encoded(Image.fromarray(np.stack([RAMP] * 3, 2)), "WEBP", lossless=True), np.stack([RAMP] * 3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ_IMAGES)
def test_images_that_lose_nothing_are_read_exactly(table: Path, kind: str, log: Log) -> None:
    make, expected = READ_IMAGES[kind]
    for part in ("train", "test"):
        rows(table / f"{part}-0.parquet", [make()] * 10)
    data, lines = log.of(table)
    assert np.array_equal(data.test.images[3].numpy(), expected)
    assert lines == []


# -- parquet -----------------------------------------------------------------------------------------------------------


def test_only_the_files_of_the_two_parts_are_read_and_the_others_named(table: Path, log: Log) -> None:
    for name in ("train_extra-0.parquet", "training.parquet", "validation-0.parquet", "README.md"):
        rows(table / name, [grey(i) for i in range(30)])
    for _ in ("decoded", "from the cache"):
        data, (line,) = log.of(table)
        assert sizes(data) == ([20, 20], [5, 5])
        assert "4 entries of the folder are not read: README.md, train_extra-0.parquet, training.parquet" in line


SHARDS: Mapping[str, tuple[list[str], str]] = {
    "one is missing": (["train-00000-of-00002"], "not all 2 files are here"),
    "the first is missing": (["train-00001-of-00002"], "not all 2 files are here"),
    "a copy": (["train-00000-of-00001", "train-00000-of-00001 (1)"], "or one twice"),
    "two sets": (["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"], "several sets"),
    "a stranger": (["train-00000-of-00001", "train-old"], "several sets"),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_set_of_files_is_whole(table: Path, kind: str) -> None:
    names, words = SHARDS[kind]
    (table / "train-0.parquet").unlink()
    for name in names:
        rows(table / f"{name}.parquet", [grey(i) for i in range(20)])
    refused(table, words, names[0])


@pytest.mark.parametrize("column", ["labels", "fine_label"])
def test_a_label_column_of_another_name_is_said_each_time(table: Path, column: str, log: Log) -> None:
    for part in ("train", "test"):
        rows(table / f"{part}-0.parquet", [grey(i) for i in range(20)], label=column, coarse_label=[0] * 20)
    for _ in ("decoded", "from the cache"):
        data, lines = log.of(table)
        assert sizes(data) == ([10, 10], [10, 10])
        assert len(lines) == 2
        assert f"the classes are those of column '{column}'" in lines[0]
        assert "columns that are not read: coarse_label" in lines[1]


def test_label_columns_that_leave_a_choice_or_none_are_refused_with_what_is_there(table: Path) -> None:
    images = [grey(i) for i in range(20)]
    rows(table / "train-0.parquet", images, fine_label=[0] * 20)
    refused(table, "train-0.parquet has the columns ['img', 'label', 'fine_label']", "one of label, labels, fine_label")
    rows(table / "train-0.parquet", images, label="target")
    refused(table, "['img', 'target']")
    rows(table / "train-0.parquet", images, label="labels")
    refused(table, "other columns", "train-0.parquet has 'img' and 'labels'", "test-0.parquet has 'img' and 'label'")


def _with_class_names(place: Path, names: list[str]) -> None:
    """The note that Hugging Face's library leaves in a file."""
    note = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})
    pq.write_table(pq.read_table(place).replace_schema_metadata({"huggingface": note}), place)


def test_files_that_number_their_classes_otherwise_are_refused(table: Path, log: Log) -> None:
    _with_class_names(table / "train-0.parquet", ["cat", "dog"])
    assert sizes(log.of(table)[0]) == ([20, 20], [5, 5])  # the other file does not say
    _with_class_names(table / "test-0.parquet", ["cat", "dog"])
    assert sizes(log.of(table)[0]) == ([20, 20], [5, 5])
    _with_class_names(table / "test-0.parquet", ["dog", "cat"])
    refused(table, "train-0.parquet has 'cat', 'dog'; test-0.parquet has", "'dog', 'cat'")


@pytest.mark.parametrize("note", [b"[" * 10_000, b"{}", b'{"info": 3}', b"\xff"])
def test_other_notes_in_a_file_are_no_classes(table: Path, note: bytes, log: Log) -> None:
    whole = pq.read_table(table / "train-0.parquet").replace_schema_metadata({"huggingface": note})
    pq.write_table(whole, table / "train-0.parquet")
    assert sizes(log.of(table)[0]) == ([20, 20], [5, 5])


LABELS: Mapping[str, tuple[pa.Array, str]] = {
    "words": (pa.array(["cat"] * 20), "holds string"),
    "words in a dictionary": (pa.array(["cat"] * 20).dictionary_encode(), "holds string"),
    "fractions": (pa.array([0.0] * 20), "holds double"),
    "truth values": (pa.array([True] * 20), "holds bool"),
    "missing": (pa.array([*[0] * 7, None, *[1] * 12]), "1 labels are missing, the first in row 7 (from 0)"),
    "negative": (pa.array([*[0] * 7, -1, *[1] * 12]), "-1 in row 7"),
    "too many": (pa.array([*[0] * 7, 2**63, *[1] * 12], pa.uint64()), "9223372036854775808 in row 7"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_no_classes_are_refused_with_file_and_row(table: Path, kind: str) -> None:
    labels, words = LABELS[kind]
    rows(table / "train-1.parquet", [grey(i) for i in range(20)], labels)
    refused(table, "train-1.parquet: column 'label'", words)


@pytest.mark.parametrize("labels", [pa.array([0, 1] * 10).dictionary_encode(), pa.array([0, 1] * 10, pa.uint8())])
def test_integers_of_any_encoding_are_labels(table: Path, labels: pa.Array, log: Log) -> None:
    rows(table / "train-0.parquet", [grey(i) for i in range(20)], labels)
    assert sizes(log.of(table)[0]) == ([10, 10], [5, 5])


def test_an_empty_file_adds_nothing_and_an_empty_part_is_refused(table: Path, log: Log) -> None:
    rows(table / "train-1.parquet", [], pa.array([], pa.int64()))
    assert sizes(log.of(table)[0]) == ([20, 20], [5, 5])
    rows(table / "test-0.parquet", [], pa.array([], pa.int64()))
    refused(table, "no images")
    (table / "test-0.parquet").write_bytes(b"")
    refused(table, "test-0.parquet: unreadable parquet file")


def test_one_tiny_image_in_millions_of_rows_is_refused_before_it_is_read(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros, image = np.zeros(3_000_000, np.int32), pa.array([grey()], pa.binary())
    columns = {"img": pa.DictionaryArray.from_arrays(pa.array(zeros), image), "label": zeros}
    pq.write_table(pa.table(columns), table / "train-0.parquet", row_group_size=3_000_000)
    assert (table / "train-0.parquet").stat().st_size < 100_000
    monkeypatch.setattr("fl_sim.data.parquet_folder.decode", lambda *_, **__: pytest.fail("decoded"))
    refused(table, "train-0.parquet", "3000000 rows in")


# -- classes -----------------------------------------------------------------------------------------------------------


def test_classes_without_samples_are_said(table: Path, log: Log) -> None:
    rows(table / "train-0.parquet", [grey(i) for i in range(40)], [1 + i % 3 for i in range(40)])
    _, lines = log.of(table)
    assert "1 of 4 classes have no training samples: 0" in lines[0]
    assert "2 of 4 classes have no test samples: 2, 3" in lines[1]
    rows(table / "train-0.parquet", [grey(i) for i in range(40)], [(0, 1, 7, 5000)[i % 4] for i in range(40)])
    _, lines = log.of(table)
    assert "4997 of 5001 classes have no training samples: 2, 3, 4, 5, 6 and 4992 more" in lines[0]
    rows(table / "train-0.parquet", [grey(i) for i in range(40)], [0] * 40)
    refused(table, "test samples of class 1, training samples up to 0")


def test_images_of_zeros_and_ones_are_said(table: Path, log: Log) -> None:
    rows(table / "train-0.parquet", [encoded(Image.fromarray(RAMP // 128))] * 40)
    _, (line,) = log.of(table)
    assert "no training image holds a value above 1" in line
