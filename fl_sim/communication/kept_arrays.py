"""Flower's arrays of NumPy values, made and read without parsing: a client's state holds the same few shapes round after round.

The bytes are those of `numpy.save`, as Flower's own `Array(values)` has them. Their header, a Python literal, depends on dtype and
shape alone.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
from flwr.app import Array
from numpy.lib import format as npy
from numpy.typing import NDArray

from fl_sim.communication.flower_private import array_of

STYPE = "numpy.ndarray"
START = b"\x93NUMPY\x01\x00"
"""Magic and version, before two bytes for the header's length."""


def array_from(values: NDArray[np.generic]) -> Array:
    """`Array(values)`, which may not be changed later."""
    if values.dtype.hasobject or not values.flags.c_contiguous:
        return Array(values)
    header, dtype = _header(values.dtype, values.shape)
    return array_of(header + values.tobytes(), STYPE, dtype=dtype, shape=values.shape)


def values_of(array: Array) -> NDArray[np.generic]:
    """`array.numpy()`: a copy.

    Raises:
        ValueError: not the bytes of an array.
    """
    return values_in(array).copy()


def values_in(array: Array) -> NDArray[np.generic]:
    """The values where they lie in the array's bytes, for reading only, where that can be.

    Raises:
        ValueError: not the bytes of an array.
    """
    data = array.data
    if array.stype != STYPE or data[: len(START)] != START:
        return array.numpy()
    end = len(START) + 2 + int.from_bytes(data[len(START) : len(START) + 2], "little")
    dtype, shape, is_fortran = _read(bytes(data[:end]))
    if dtype.hasobject or is_fortran or len(data) != end + math.prod(shape) * dtype.itemsize:
        return array.numpy()
    return np.frombuffer(data, dtype, offset=end).reshape(shape)


@lru_cache(maxsize=256)
def _header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> tuple[bytes, str]:
    """(what comes before the values, the dtype's name)."""
    stream = io.BytesIO()
    descr = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(stream, descr)
    return stream.getvalue(), str(dtype)


@lru_cache(maxsize=256)
def _read(header: bytes) -> tuple[np.dtype[np.generic], tuple[int, ...], bool]:
    stream = io.BytesIO(header)
    npy.read_magic(stream)
    shape, is_fortran, dtype = npy.read_array_header_1_0(stream)
    return dtype, shape, is_fortran
