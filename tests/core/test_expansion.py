"""Small files that would become large: refused in one line before they do."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from unfilled import unfilled

from fl_sim import models
from fl_sim.codecs import Schema
from fl_sim.communication.ledger import TYPES, WORDS, Ledger
from fl_sim.communication.mask_log import MaskRecorder, read_masks
from fl_sim.core.parquet import read_table, write_table
from fl_sim.core.types import UserError
from fl_sim.data import load
from fl_sim.training import snapshot
from fl_sim.training.model_file import open_saved, read_model, write_model

MEGABYTE, TIMES = bytes(1_000_000), 20_000
"""Twenty gigabytes, where it is written out: a test that reads it does not go unnoticed."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))


def repeated(value: bytes | str, times: int = TIMES) -> pa.DictionaryArray:
    """One value in many rows; parquet stores it once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([value]))


def folder_of(place: Path, images: pa.Array, *, plainly: bool = False) -> Path:
    """A parquet folder with these images in both parts; read back `plainly`, without the note on how Arrow had it."""
    place.mkdir(exist_ok=True)
    table = pa.table({"img": images, "label": np.arange(len(images)) % 2})
    for part in ("train", "test"):
        pq.write_table(table, place / f"{part}-0.parquet", store_schema=not plainly)
    return place


def refused(read: Callable[[], object], *words: str) -> None:
    """In one line, and before a tenth of the memory was asked for."""
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert pool.bytes_allocated() - before < 100_000_000


@pytest.mark.parametrize("plainly", [False, True])
def test_one_large_value_in_every_row(tmp_path: Path, plainly: bool) -> None:
    place = folder_of(tmp_path / "set", repeated(MEGABYTE), plainly=plainly)
    assert sum(path.stat().st_size for path in place.iterdir()) < 300_000
    refused(lambda: load(str(place)), "data.source", "expand to 20000000000")


def test_one_large_mask_and_one_large_word_in_every_row(tmp_path: Path) -> None:
    path, schema = tmp_path / "rows.parquet", Schema.of({"w": torch.zeros(8)}, ["w"])
    few = np.ones(TIMES, np.int64)
    pq.write_table(
        pa.table({"round": few, "direction": repeated("up"), "client": few, "mask": repeated(MEGABYTE)}), path
    )
    refused(lambda: MaskRecorder([]).extend(path), "expand to")
    refused(lambda: list(read_masks(path, schema)), "expand to")
    columns = {name: repeated("x" * 1_000_000) if name in WORDS else few for name in TYPES}
    pq.write_table(pa.table(columns), path, store_schema=False)
    refused(lambda: Ledger.read(path), "ledger", "expand to")


def test_pages_that_decompress_to_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_sim.core.parquet.FREE_BYTES", 100_000)
    monkeypatch.setattr("fl_sim.core.parquet._string_bytes", lambda *_: pytest.fail("decompressed"))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"mask": [MEGABYTE * 5]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 5_000
    with pytest.raises(ValueError, match=r"bytes that expand to 50\d+; allowed"):
        read_table(path, ["mask"])


@pytest.mark.parametrize(
    "column", [pa.array([[1, 2, 3]]), pa.array([b"x" * 99], pa.binary(99)), pa.array([{"bytes": [b"x"]}])]
)
def test_lists_and_values_of_a_declared_width_are_not_read(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"img": column, "label": [0]}), tmp_path / "rows.parquet")
    with pytest.raises(
        ValueError, match=r"column .img.* holds (lists; needed: one value in each row|\w+; allowed: .*)$"
    ):
        read_table(tmp_path / "rows.parquet", ["img", "label"])
    assert read_table(tmp_path / "rows.parquet", ["label"]).num_rows == 1


def test_what_equal_values_may_honestly_save_is_read(tmp_path: Path) -> None:
    """A mask that went to a thousand clients: far more than its file, and less than any file may hold."""
    path = tmp_path / "rows.parquet"
    masks = pa.chunked_array([repeated(bytes(range(256)), 500), pa.array([None, b"x"]).dictionary_encode()])
    pq.write_table(pa.table({"mask": masks, "unread": [[1]] * 502}), path)
    read = read_table(path, ["mask"]).column("mask").to_pylist()
    assert read == [bytes(range(256))] * 500 + [None, b"x"]


def picture(size: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (size, size)).save(stream, "PNG")
    return stream.getvalue()


def test_large_empty_images(tmp_path: Path) -> None:
    """Two kilobytes each, four million pixels each."""
    images = repeated(picture(2048), 200)
    refused(lambda: load(str(folder_of(tmp_path / "set", images, plainly=True))), "data.source", "expand to 838860800")


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"name": "resnet20", "width": 99.0}, "a model of"),
        ({"name": "resnet20", "width": 101}, "width = 101: "),
        ({"name": "resnet20", "width": "1"}, "width = '1': "),
        ({"name": "mlp", "image_size": 2048, "in_channels": 65536}, "a model of"),
        ({"name": "mlp", "image_size": 10**6}, "image_size = 1000000: "),
        ({"name": "cnn", "num_classes": 2**40}, "num_classes = 1099511627776: "),
        ({"name": "cnn", "in_channels": 0}, "in_channels = 0: "),
        ({"name": "cnn", "gating": 3}, "gating = 3: "),
        ({"name": "cnn", "depth": 3}, "depth = 3: "),
    ],
)
def test_a_description_far_larger_than_its_file(tmp_path: Path, described: dict[str, object], words: str) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, {"a": torch.ones(2)}, described)
    refused(lambda: read_model(path), "model file", words)


def test_a_tensor_of_no_numbers_and_many_rows(tmp_path: Path) -> None:
    """The number of classes is taken from the classifier's shape where the file says nothing."""
    path, model = tmp_path / "model.safetensors", models.build("cnn")
    last = list(snapshot(model))[-1]
    write_model(path, {**snapshot(model), last: torch.ones(2**40, 0)}, {})
    refused(lambda: open_saved(path, name="cnn"), "num_classes = 1099511627776")


def test_metadata_nested_too_deeply(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"fl_sim.model": "[" * 100_000})
    refused(lambda: read_model(path), "safetensors")


def test_every_model_can_be_counted_before_it_is_built() -> None:
    for name in models.MODELS:
        with torch.device("meta"), unfilled():
            tokens = name in ("lstm", "transformer")
            asked = models.Interface((64,), 10, 50, each_token=True) if tokens else models.Interface((3, 64, 64), 10)
            counted = models.build_for(name, asked)
        assert all(value.is_meta for value in counted.parameters()), name


def test_a_column_whose_metadata_contradict_themselves() -> None:
    """Found by `tests/support/guided.py`: asked for this column's metadata, pyarrow 26 ends the process."""
    with pytest.raises(OSError, match="histogram"):
        read_table(Path(__file__).parents[1] / "golden" / "levels.parquet", ["img", "label"])


def test_reading_leaves_no_thread_behind(tmp_path: Path) -> None:
    """One that gives back its pages while the program ends aborts it: about one program in a hundred, when threads read."""
    columns = {name: pa.array(np.arange(1000)) for name in "abcdefgh"} | {"words": pa.array(["x", "y"] * 500)}
    write_table(pa.table(columns), tmp_path / "some.parquet")
    program = """
import os, sys
from pathlib import Path
import pyarrow.parquet
from fl_sim.core.parquet import read_table, write_table
before = len(os.listdir("/proc/self/task"))
table = read_table(Path(sys.argv[1]), [*"abcdefgh", "words"])
print(table.num_columns, len(os.listdir("/proc/self/task")) - before)
"""
    call = [sys.executable, "-c", program, str(tmp_path / "some.parquet")]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.split() == ["9", "0"]
