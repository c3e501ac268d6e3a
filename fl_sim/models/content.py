"""Hashes of values: tensors of any dtype, layout and device, arrays, generators' states, and what holds them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import xxhash
from torch import Tensor

from fl_sim.models.memory_overlap import strided_parts

Hash = xxhash.xxh3_64 | xxhash.xxh3_128


def digest_of(value: object) -> str:
    """Sixteen hexadecimal digits of a value: equal for equal bits, whatever the memory layout and device.

    Args:
        value: a tensor, an array, a mapping or sequence of such, or anything whose `repr` says what it is.
    """
    check = xxhash.xxh3_64()
    add_content(value, check)
    return check.hexdigest()


def add_content(value: object, check: Hash) -> None:
    """Add a value to a hash; see `digest_of`."""
    match value:
        case Tensor():
            check.update(f"{value.dtype}{tuple(value.shape)}{value.layout}".encode())
            for part in strided_parts(value):
                check.update(f"{tuple(part.shape)}".encode())
                check.update(_bytes(part))
        case np.ndarray():
            check.update(f"{value.dtype}{value.shape}".encode())
            check.update(
                repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
            )
        case Mapping():
            for key, each in value.items():
                check.update(repr(key).encode())
                add_content(each, check)
        case list() | tuple():
            check.update(f"{len(value)}".encode())
            for each in value:
                add_content(each, check)
        case _:
            check.update(repr(value).encode())


def _bytes(part: Tensor) -> memoryview:
    flat = part.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (flat.int_repr() if flat.is_quantized else flat).view(torch.uint8).numpy().data
