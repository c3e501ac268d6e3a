"""Arrays in a client's state: the same bytes and values as Flower's own."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array
from numpy.typing import NDArray

from fl_sim.communication.flower_private import array_of
from fl_sim.communication.kept_arrays import STYPE, array_from, values_of

VALUES = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(-0.0),
    np.array([np.nan, 1e-45], np.float32),
    np.zeros((0, 4), np.int64),
    np.array([True, False]),
    np.arange(6).reshape(2, 3).T,
    np.arange(9)[::2],
    np.arange(3, dtype=">i4"),
]


@pytest.mark.parametrize("values", VALUES, ids=lambda v: f"{v.dtype}{v.shape}")
def test_they_are_flowers(values: NDArray[np.generic]) -> None:
    own, flowers = array_from(values), Array(values)
    for name in ("dtype", "shape", "stype", "data"):
        assert getattr(own, name) == getattr(flowers, name)
    assert own.object_id == flowers.object_id
    read = values_of(own)
    assert (read.dtype, read.shape, read.tobytes()) == (values.dtype, values.shape, values.tobytes())
    assert read.flags.writeable
    assert not np.shares_memory(read, values_of(own))


@pytest.mark.parametrize("cut", [-1, 3, 9, 40])
def test_damaged_bytes_are_refused(cut: int) -> None:
    data = array_from(np.arange(5)).data
    with pytest.raises((ValueError, EOFError)):
        values_of(array_of(data[:cut], STYPE))
    with pytest.raises(ValueError, match=r"pickle|array"):
        values_of(array_of(data.replace(b"'<i8'", b"'|O' "), STYPE))
