"""Hostile data files: parquet and the images in it are read, or refused in one line."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import LENGTHS, SEEDS, mutate, one_line
from hypothesis import given, settings
from images_in_parquet import IMAGES, LABELS, PARQUET, png, table_bytes
from PIL import Image

from fl_sim.core.parquet import read_table
from fl_sim.core.types import UserError
from fl_sim.data import load as load_data

LAYOUTS: Mapping[str, Callable[[], bytes]] = {
    "no bytes field": lambda: table_bytes(img=pa.array([{"path": "x"}] * 40), label=pa.array(LABELS)),
    "numbers for images": lambda: table_bytes(img=pa.array(LABELS), label=pa.array(LABELS)),
    "words for images": lambda: table_bytes(img=pa.array(["x"] * 40), label=pa.array(LABELS)),
    "no image": lambda: table_bytes(img=pa.array([None] * 40, pa.binary()), label=pa.array(LABELS)),
    "words for labels": lambda: table_bytes(img=pa.array(IMAGES), label=pa.array(["cat"] * 40)),
    "missing labels": lambda: table_bytes(img=pa.array(IMAGES), label=pa.array([None, *LABELS[1:]])),
    "negative labels": lambda: table_bytes(img=pa.array(IMAGES), label=pa.array([-1] * 40)),
    "an enormous label": lambda: table_bytes(img=pa.array(IMAGES), label=pa.array([2**62, *LABELS[1:]])),
    "fractions for labels": lambda: table_bytes(img=pa.array(IMAGES), label=pa.array([0.5] * 40)),
    "lists for labels": lambda: table_bytes(img=pa.array(IMAGES), label=pa.array([[1]] * 40)),
    "nothing": lambda: table_bytes(img=pa.array([], pa.binary()), label=pa.array([], pa.int64())),
    "a broken image": lambda: table_bytes(
        img=pa.array([{"bytes": png(0)[:-30], "path": None}, *IMAGES[1:]]), label=pa.array(LABELS)
    ),
    "a large image": lambda: table_bytes(
        img=pa.array([{"bytes": _large(), "path": None}] * 40), label=pa.array(LABELS)
    ),
    "a bomb": lambda: table_bytes(
        img=pa.array([{"bytes": _bomb(), "path": None}, *IMAGES[1:]]), label=pa.array(LABELS)
    ),
}


def _bomb() -> bytes:
    """A PNG that declares 2^31 - 1 times 2^31 - 1 pixels."""
    import zlib

    data = bytearray(png(0))
    data[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _large() -> bytes:
    """A PNG of some kilobytes that holds nine million black pixels."""
    stream = io.BytesIO()
    Image.new("L", (3000, 3000)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-0.parquet").write_bytes(PARQUET)
    return tmp_path / "data"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_of_another_layout_is_refused_in_one_line(data_folder: Path, layout: str) -> None:
    (data_folder / "train-0.parquet").write_bytes(LAYOUTS[layout]())
    with pytest.raises(UserError) as caught:
        load_data(str(data_folder))
    assert "\n" not in str(caught.value)


@LENGTHS
def test_parquet_data(data_folder: Path, length: settings) -> None:
    plain = table_bytes(img=pa.array([image["bytes"] for image in IMAGES]), label=pa.array(LABELS))

    @length
    @given(seed=SEEDS)
    def files(seed: int) -> None:
        (data_folder / "train-0.parquet").write_bytes(mutate((PARQUET, plain)[seed % 2], seed))
        data = one_line(lambda: load_data(str(data_folder)))
        if data is not None:
            assert data.shape == (1, 8, 8)
            assert 0 <= int(data.train.labels.min()) <= int(data.train.labels.max()) < data.num_classes

    files()


def test_rows_without_news_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_sim.core.parquet.FREE_ROWS", 1000)
    path, table = (
        tmp_path / "bomb.parquet",
        pa.table({"img": pa.nulls(3_000_000, pa.binary()), "label": pa.array(np.zeros(3_000_000, np.int64))}),
    )
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"3000000 rows in \d+ bytes"):
        read_table(path, ["label"])
    (tmp_path / "train-0.parquet").write_bytes(path.read_bytes())
    (tmp_path / "test-0.parquet").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="rows in"):
        load_data(str(tmp_path))
