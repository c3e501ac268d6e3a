"""Payloads of several clients, encoded and decoded at once where they are alike: the bytes and bits of `encode` and `decode`.

What is not alike, or not right, is left to those two, client by client: they also say what is wrong, and with which client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.codecs import mask_coding, tensor_coding
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.held_model import HeldModel, held
from fl_sim.codecs.payload import joined, whole_payload
from fl_sim.codecs.payload_format import AGAINST_BASE, HEAD, MAGIC, NONE, VERSION, coder_of_type, whole
from fl_sim.codecs.payload_reading import Opened
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.sections import KINDS, MASK, SECTION_OF
from fl_sim.codecs.tensor_coding import Buffer, coder_of_others
from fl_sim.codecs.value_coder import Together, ValueCoder
from fl_sim.codecs.value_coding import EXACT, VALUES, is_relative
from fl_sim.core.types import Params

Rows = NDArray[np.float32]
"""(clients, values)."""


def encode_all(
    rows: Tensor,
    *,
    schema: Schema,
    values: str,
    seeds: Sequence[int],
    masks: Tensor | None = None,
    base: Params | None = None,
) -> list[bytes] | None:
    """Encode several clients' parameters, each as `encode` does with its mask and seed, the same base, and no held mask.

    Args:
        rows: float32 (clients, values), on the CPU; each row in the order of the schema.
        schema: the receiver's expectations.
        values: value type, a name of `VALUES`.
        seeds: of each client.
        masks: the coordinates to send, bool (clients, prunable values); None sends all.
        base: the model that the receiver holds, for the value types that code against it.

    Returns:
        The payloads; None where each is to be encoded by itself: values of this type are not encoded together, or one is not
        finite or beyond the type's range, which `encode` names.
    """
    if not (schema.is_flat and isinstance(VALUES[values], Together)) or not tensor_coding.finite(rows.reshape(-1)):
        return None
    known = HeldModel.of(base, None, schema) if is_relative(values) and base is not None else None
    if masks is not None and known is not None:
        return None
    if masks is not None:
        return _encode_masked(rows, masks, schema=schema, values=values, seeds=seeds)
    if values == EXACT:
        return [whole_payload(row, schema) for row in np.ascontiguousarray(rows.numpy(), dtype="<f4")]
    try:
        coder = coder_of_type(values, None, schema, known)
        assert isinstance(coder, Together)
        sections = _sections(rows.numpy(), schema, coder, seeds, known)
    except ValueError:
        return None
    head = HEAD.pack(MAGIC, VERSION, coder.id, NONE, 0 if known is None else AGAINST_BASE, schema.hash)
    head += b"" if known is None else known.hash
    return [joined(head, schema.prunable_size, [b"", *parts]) for parts in sections]


def _sections(
    rows: Rows, schema: Schema, coder: Together, seeds: Sequence[int], known: HeldModel | None
) -> list[tuple[Buffer, ...]]:
    """The four sections of each client, as `tensor_coding.encode` makes them."""
    made: list[Sequence[Buffer]] = [coder.encode_all(rows[:, : schema.prunable_size], seeds)]
    base = None if known is None else known.others
    made += [others.encode_all(rows[:, place], seeds) for place, _, others in _others(schema, coder, base)]
    return list(zip(*made, strict=True))


def _others(schema: Schema, coder: ValueCoder, base: Rows | None) -> Iterator[tuple[slice, str, Together]]:
    """(place in a row, kind, coder) of what is not prunable; `base`: the receiver's values there, where the coder has one."""
    count = schema.prunable_size
    ends = np.cumsum([schema.section_bytes[kind] // 4 for kind in KINDS]).tolist()
    for kind, (start, end) in zip(KINDS[1:], pairwise(ends), strict=True):
        others = coder_of_others(kind, schema, coder, None if base is None else base[start - count : end - count])
        assert isinstance(others, Together)
        yield slice(start, end), kind, others


def _encode_masked(
    rows: Tensor, masks: Tensor, *, schema: Schema, values: str, seeds: Sequence[int]
) -> list[bytes] | None:
    """Payloads of clients under masks of their own: the masks are coded together, the values one after the other."""
    if not schema.is_flat or not schema.prunable_size:
        return None
    made = []
    for (mode, mask_bytes), row, alive, seed in zip(
        mask_coding.encode_all(masks.numpy(), schema.mask_layout), rows, masks, seeds, strict=True
    ):
        coder = coder_of_type(values, alive, schema, None)
        sections = tensor_coding.encode(schema.view(row), alive, schema=schema, coder=coder, seed=seed)
        head = HEAD.pack(MAGIC, VERSION, coder.id, mode, 0, schema.hash)
        made.append(joined(head, int(np.count_nonzero(alive.numpy())), [mask_bytes, *sections]))
    return made


class Stack(NamedTuple):
    """Decoded payloads of several clients.

    Attributes:
        rows: float32 (clients, values), in the order of the schema; 0 outside of the masks.
        masks: bool (clients, prunable values); None = everything travelled.
    """

    rows: Tensor
    masks: Tensor | None


def alike(payloads: Sequence[Opened]) -> Iterator[list[int]]:
    """Which of several payloads of one schema are to be decoded together: the places of each kind."""
    places: dict[tuple[object, ...], list[int]] = {}
    for place, each in enumerate(payloads):
        places.setdefault((each.mode, each.values, each.base_hash), []).append(place)
    yield from places.values()


def decode_all(payloads: Sequence[Opened], base: Params | None = None) -> Stack | None:
    """Decode payloads that are `alike`, each as `decode` does.

    None where each is to be decoded by itself: they are of types that are not decoded together, or one is not right.
    """
    first = payloads[0]
    if not first.schema.is_flat or first.held_mask is not None or (first.mode != NONE and first.base_hash):
        return None
    if not isinstance(VALUES.get(first.values), Together) or not all(each.is_whole for each in payloads):
        return None
    try:
        stack = _decoded_whole(payloads, base) if first.mode == NONE else _decoded_masked(payloads)
    except CorruptPayload:
        return None
    return stack if stack is not None and tensor_coding.finite(stack.rows.reshape(-1)) else None


def _decoded_whole(payloads: Sequence[Opened], base: Params | None) -> Stack | None:
    """Of clients that sent everything."""
    first, schema = payloads[0], payloads[0].schema
    if any(each.nnz != schema.prunable_size or each.lengths[MASK] for each in payloads):
        return None
    if first.values == EXACT:
        if any(each.lengths != whole(schema).lengths for each in payloads):
            return None
        bodies = np.frombuffer(bytearray().join([each.body for each in payloads]), dtype="<f4")
        return Stack(torch.from_numpy(bodies.reshape(len(payloads), -1)), None)
    known = held(first.base_hash, base, None, schema)
    coder = coder_of_type(first.values, None, schema, known)
    assert isinstance(coder, Together)
    rows: Rows = np.empty((len(payloads), schema.size), dtype=np.float32)
    rows[:, : schema.prunable_size] = coder.decode_all(_each(payloads, "prunable"), schema.prunable_size)
    _fill_others(rows, payloads, coder, None if known is None else known.others)
    return Stack(torch.from_numpy(rows), None)


def _decoded_masked(payloads: Sequence[Opened]) -> Stack | None:
    """Of clients that each chose what to send: the masks are decoded together, integers and signs one after the other."""
    first, schema = payloads[0], payloads[0].schema
    masks = mask_coding.decode_all(first.mode, [each.section(MASK) for each in payloads], schema.mask_layout)
    if masks is None or np.count_nonzero(masks, axis=1).tolist() != [each.nnz for each in payloads]:
        return None
    values = [
        coder_of_type(each.values, torch.from_numpy(alive), schema, None).decode(section, each.nnz)
        for each, alive, section in zip(payloads, masks, _each(payloads, "prunable"), strict=True)
    ]
    rows: Rows = np.zeros((len(payloads), schema.size), dtype=np.float32)
    rows[:, : schema.prunable_size][masks] = np.concatenate(values)
    _fill_others(rows, payloads, VALUES[first.values], None)
    return Stack(torch.from_numpy(rows), torch.from_numpy(masks))


def _fill_others(rows: Rows, payloads: Sequence[Opened], coder: ValueCoder, base: Rows | None) -> None:
    for place, kind, others in _others(payloads[0].schema, coder, base):
        rows[:, place] = others.decode_all(_each(payloads, kind), place.stop - place.start)


def _each(payloads: Sequence[Opened], kind: str) -> list[memoryview]:
    """Of each payload the section of a kind of tensor."""
    return [each.section(SECTION_OF[kind]) for each in payloads]
