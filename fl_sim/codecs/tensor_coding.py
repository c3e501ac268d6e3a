"""The four value sections of a payload: prunable values through a value coder, everything else exactly."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.plane_coding import shuffled, unshuffled
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.sections import KINDS, SECTION_OF
from fl_sim.codecs.value_coder import ValueCoder
from fl_sim.codecs.value_coding import EXACT, VALUES, fitted
from fl_sim.core.kernels import all_finite
from fl_sim.core.types import Params

Buffer = bytes | memoryview


def finite(values: Tensor) -> bool:
    """Whether a contiguous 1-D float32 tensor holds neither NaN nor infinity."""
    return all_finite(values.numpy())


def swept(check: xxhash.xxh3_64, values: NDArray[np.float32], into: NDArray[np.float32] | None = None) -> bool:
    """Feed values to a checksum, and copy them; whether all are finite. Piece by piece, so that each is fetched from memory
    once."""
    fine = True
    for at in range(0, len(values), PIECE):
        piece = values[at : at + PIECE]
        check.update(piece.data)
        fine = fine and all_finite(piece)
        if into is not None:
            into[at : at + PIECE] = piece
    return fine


def encode(
    params: Params,
    alive: Tensor | None,
    *,
    schema: Schema,
    coder: ValueCoder,
    seed: int,
    others: NDArray[np.float32] | None = None,
) -> list[Buffer]:
    """The four sections' bytes; `others`: the receiver's values of what is not prunable, where the coder codes against them.

    Raises:
        ValueError: a value that is not finite, with its tensor's name.
    """
    if not schema.is_flat:
        return _encode_mixed(params, alive, schema=schema, coder=coder)
    tensor = schema.flat(params)
    if not finite(tensor):
        refuse(params, schema)
    flat = tensor.numpy()
    count = schema.prunable_size
    values = flat[:count] if alive is None else gathered(flat[:count], alive.numpy())
    parts: list[Buffer] = [coder.encode(values, seed)]
    at = count
    for kind in KINDS[1:]:
        size = schema.section_bytes[kind] // 4
        part = flat[at : at + size]
        base = None if others is None else others[at - count :][:size]
        parts.append(coder_of_others(kind, schema, coder, base).encode(part, seed) if size else b"")
        at += size
    return parts


def coder_of_others(kind: str, schema: Schema, coder: ValueCoder, base: NDArray[np.float32] | None) -> ValueCoder:
    """How tensors of a kind that is not prunable travel: exactly; against `base`, the receiver's values, where there is one;
    else compressed where the prunable values are."""
    if base is None:
        return VALUES[EXACT if coder.id == VALUES[EXACT].id else "float32-zstd"]
    counts = tuple(size for size, other in zip(schema.numels, schema.kinds, strict=True) if other == kind)
    return fitted("float32-delta", counts, base)


CHUNK, PIECE = 1 << 18, 1 << 16


def gathered(flat: NDArray[np.float32], alive: NDArray[np.bool_]) -> NDArray[np.float32]:
    """`flat[alive]`, in pieces that stay in the cache; by positions, which beats a mask two to four times at half density."""
    pieces = [flat[i : i + CHUNK].compress(alive[i : i + CHUNK]) for i in range(0, len(flat), CHUNK)]
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else flat


def _scatter(flat: NDArray[np.float32], alive: NDArray[np.bool_], values: NDArray[np.float32]) -> None:
    """`flat[alive] = values`, in pieces."""
    done = 0
    for i in range(0, len(flat), CHUNK):
        (where,) = alive[i : i + CHUNK].nonzero()
        part = values[done : done + len(where)]
        # Values lie in the payload behind a mask of any length; assigning from unaligned memory takes five times as long.
        flat[i : i + CHUNK][where] = part if part.flags.aligned else part.copy()
        done += len(where)


def refuse(params: Params, schema: Schema) -> None:
    """Raises ValueError: the value that is not finite, by its tensor's name."""
    for name in schema.names:
        if not bool(torch.isfinite(params[name]).all()):
            raise ValueError(f"parameter {name!r} holds NaN or infinity, which is never sent")


def _exact(raw: memoryview, width: int, coder: ValueCoder) -> Buffer:
    compress = len(raw) > 0 and coder.id != VALUES[EXACT].id
    return shuffled(raw, width) if compress else raw


def _restored(data: memoryview, width: int, size: int, coder: ValueCoder) -> Buffer:
    if size and coder.id != VALUES[EXACT].id:
        return unshuffled(data, width, size)
    if len(data) != size:
        raise CorruptPayload("a section has another length than the schema says")
    return data


def decode(
    sections: dict[str, memoryview],
    alive: NDArray[np.bool_] | None,
    *,
    schema: Schema,
    coder: ValueCoder,
    count: int,
    others: NDArray[np.float32] | None = None,
) -> Params:
    """Invert `encode`; `count` values are due."""
    if not schema.is_flat:
        return _decode_mixed(sections, alive, schema=schema, coder=coder)
    values = coder.decode(sections["values"], count)
    flat = torch.empty(schema.size) if alive is None else torch.zeros(schema.size)
    array = flat.numpy()
    if alive is None:
        array[: schema.prunable_size] = values
    else:
        _scatter(array[: schema.prunable_size], alive, values)
    at = schema.prunable_size
    for kind in KINDS[1:]:
        size = schema.section_bytes[kind] // 4
        if not size and not sections[kind]:
            continue
        base = None if others is None else others[at - schema.prunable_size :][:size]
        array[at : at + size] = coder_of_others(kind, schema, coder, base).decode(sections[kind], size)
        at += size
    if not finite(flat):
        raise CorruptPayload("a value is NaN or infinite")
    return schema.view(flat)


@cache
def _accept_read_only() -> None:
    """PyTorch knows no read-only tensors and warns once per process: spend that warning here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(np.frombuffer(bytes(4), dtype="<f4"))


def in_place(body: memoryview) -> NDArray[np.float32]:
    """The values of a dense float32 payload where they lie: its body is aligned."""
    _accept_read_only()
    return np.frombuffer(body, dtype="<f4")


# -- schemas with other dtypes: tensor by tensor, raw ------------------------------------------------------------------


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _encode_mixed(params: Params, alive: Tensor | None, *, schema: Schema, coder: ValueCoder) -> list[Buffer]:
    parts: dict[str, list[bytes]] = {kind: [] for kind in KINDS}
    at = 0
    for name, kind, size, dtype in zip(schema.names, schema.kinds, schema.numels, schema.dtypes, strict=True):
        tensor = params[name].detach().reshape(-1).cpu()
        if tensor.dtype != dtype:
            raise ValueError(f"parameter {name!r} is {tensor.dtype}, the schema says {dtype}")
        if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            refuse(params, schema)
        if kind == "prunable" and alive is not None:
            tensor = tensor[alive[at : at + size]]
        at += size
        parts[kind].append(_bytes(tensor))
    return [_exact(memoryview(b"".join(parts[kind])), 1, coder) for kind in KINDS]


def _decode_mixed(
    sections: dict[str, memoryview], alive: NDArray[np.bool_] | None, *, schema: Schema, coder: ValueCoder
) -> Params:
    masks = _masks(alive, schema)
    due = dict.fromkeys(KINDS, 0)
    for name, kind, size, dtype in zip(schema.names, schema.kinds, schema.numels, schema.dtypes, strict=True):
        due[kind] += (int(masks[name].sum()) if name in masks else size) * dtype.itemsize
    raw = {kind: memoryview(_restored(sections[s], 1, due[kind], coder)) for kind, s in SECTION_OF.items()}
    at = dict.fromkeys(KINDS, 0)
    params: Params = {}
    for name, kind, shape, dtype in zip(schema.names, schema.kinds, schema.shapes, schema.dtypes, strict=True):
        tensor = torch.zeros(shape.numel(), dtype=dtype)
        chosen = masks.get(name)
        size = (shape.numel() if chosen is None else int(chosen.sum())) * dtype.itemsize
        values = _from_bytes(raw[kind][at[kind] : at[kind] + size], dtype)
        at[kind] += size
        tensor[slice(None) if chosen is None else chosen] = values
        params[name] = tensor.view(shape)
    return params


def _masks(alive: NDArray[np.bool_] | None, schema: Schema) -> dict[str, Tensor]:
    if alive is None:
        return {}
    cut = torch.from_numpy(alive).split(list(schema.numels[: len(schema.prunable)]))
    return dict(zip(schema.prunable, cut, strict=True))


def _from_bytes(data: memoryview, dtype: torch.dtype) -> Tensor:
    if not len(data):
        return torch.empty(0, dtype=dtype)
    tensor = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    if dtype == torch.bool and int(tensor.max()) > 1:
        raise CorruptPayload("a bool is neither 0 nor 1")
    tensor = tensor.view(dtype)
    if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        raise CorruptPayload("a value is NaN or infinite")
    return tensor
