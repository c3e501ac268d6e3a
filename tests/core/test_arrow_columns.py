"""Columns between NumPy and Arrow: as Arrow's own conversions make them, without pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from fl_sim.core.parquet import array_of, encoded, numbers_of, words_of

WORDS = ("down", "", "größer")


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.float64])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_numbers_there_and_back(kind: type[np.number], size: int) -> None:
    values = np.arange(size).astype(kind)
    column = numbers_of(values)
    assert column.equals(pa.array(values))
    back = array_of(column)
    assert back.dtype == values.dtype
    assert np.array_equal(back, values)


def test_numbers_in_several_chunks() -> None:
    chunked = pa.chunked_array([pa.array([1, 2]), pa.array([], pa.int64()), pa.array([3, 4]).slice(1)])
    assert array_of(chunked).tolist() == [1, 2, 4]
    assert array_of(pa.chunked_array([], pa.int64())).tolist() == []


@pytest.mark.parametrize("codes", [[], [2, 0, 0, 1]])
def test_words(codes: list[int]) -> None:
    numbers = np.array(codes, np.int8)
    plain = pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(WORDS))
    ours = words_of(numbers, WORDS)
    assert ours.equals(plain)
    assert encoded(pa.table({"w": ours})) == encoded(pa.table({"w": plain}))


@pytest.mark.parametrize("column", [pa.array([1, None]), pa.array(["a"])])
def test_no_numbers(column: pa.Array) -> None:
    with pytest.raises(pa.ArrowException):
        array_of(column)


def test_without_pandas() -> None:
    """`pa.array` and `to_numpy` import pandas where it is installed, which takes a third of a second of each run."""
    done = """
import sys
import numpy as np
from fl_sim.core.parquet import array_of, encoded, numbers_of, words_of
import pyarrow as pa
column = numbers_of(np.arange(3))
encoded(pa.Table.from_arrays([column, words_of(np.zeros(3, np.int8), ["a"])], ["n", "w"]))
array_of(pa.chunked_array([column]))
sys.exit(next((name for name in sys.modules if name.startswith("pandas")), 0))
"""
    assert subprocess.run([sys.executable, "-c", done], check=False).returncode == 0
