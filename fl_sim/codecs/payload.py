"""Writing a payload; `payload_format` says what it consists of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.codecs import mask_coding, payload_memory, tensor_coding
from fl_sim.codecs.held_model import HeldModel
from fl_sim.codecs.mask_coding import MODES
from fl_sim.codecs.own_coding import Own
from fl_sim.codecs.payload_format import (
    AGAINST_BASE,
    CHECK,
    HEAD,
    HELD,
    MAGIC,
    NONE,
    VERSION,
    coder_of_type,
    last_bytes,
    mixed_coder,
    names_held_mask,
    others_of,
    whole,
    with_lengths,
)
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.value_coder import ValueCoder
from fl_sim.codecs.value_coding import EXACT, VALUES, is_relative
from fl_sim.core.types import Mask, Params


def encode(
    params: Params,
    sent_mask: Mask | None,
    *,
    schema: Schema,
    held_mask: Mask | None = None,
    values: str | Sequence[str] | Own = "float32",
    seed: int = 0,
    base: Params | None = None,
    contexts: bool = False,
) -> bytes:
    """Encode parameters.

    Args:
        params: a tensor for every name of the schema, finite.
        sent_mask: prunable coordinates to send; None sends all.
        schema: the receiver's expectations.
        held_mask: the mask that the receiver holds, or None.
        values: value type of the prunable float32 values, a name of `VALUES`; or one for each prunable tensor; or a
            codec of the user's own, which takes no mask. Tensors of other dtypes travel exactly, whatever the value type; a
            run has none, because its entries travel as float32.
        seed: feeds the stochastic rounding of integers.
        base: the model that the receiver holds, bit for bit, for the value types that code against it.
        contexts: whether the mask is also coded in contexts, which takes longer, and sent so where that is smaller.

    Raises:
        ValueError: NaN or infinity (named), a value beyond the value type's range, a name or shape not in the schema, or a
            value type that codes against a base where none is given.
    """
    if sent_mask is None and values == EXACT and schema.is_flat:
        return _encode_whole(params, schema)
    alive = None if sent_mask is None else schema.flat_mask(sent_mask)
    known = HeldModel.of(base, alive, schema) if _is_relative(values, schema) and base is not None else None
    coder = _coder(values, alive, schema, known)
    before = None if held_mask is None else schema.flat_mask(held_mask)
    mode, mask_bytes = _encode_mask(alive, before, schema, contexts)
    head = HEAD.pack(MAGIC, VERSION, coder.id, mode, 0 if known is None else AGAINST_BASE, schema.hash)
    if before is not None and names_held_mask(mode):
        head += mask_coding.flat_hash(before)
    if known is not None:
        head += known.hash
    sent = schema.prunable_size if alive is None else int(np.count_nonzero(alive.numpy()))
    parts = [
        mask_bytes,
        *tensor_coding.encode(params, alive, schema=schema, coder=coder, seed=seed, others=others_of(known, coder)),
    ]
    return joined(head, sent, parts)


def joined(head: bytes, sent: int, parts: Sequence[tensor_coding.Buffer]) -> bytes:
    """A payload of a header, which lacks the lengths, and the parts of a body."""
    head = with_lengths(head, sent, map(len, parts))
    check = xxhash.xxh3_64(head)
    for part in parts:
        check.update(part)
    return b"".join([head, *parts, last_bytes(check)])


def _is_relative(values: str | Sequence[str] | Own, schema: Schema) -> bool:
    """Whether values are coded against the model that the receiver holds."""
    if isinstance(values, Own) or not schema.is_flat:
        return False
    types = (values,) if isinstance(values, str) else values
    return any(name in VALUES and is_relative(name) for name in types)


def _coder(
    values: str | Sequence[str] | Own, alive: Tensor | None, schema: Schema, known: HeldModel | None
) -> ValueCoder:
    if isinstance(values, str):
        return coder_of_type(values, alive, schema, known)
    if not isinstance(values, Own):
        return mixed_coder(alive, schema, known, tuple(values))
    if alive is not None or not schema.is_flat:
        raise ValueError(f"{values.name} codes whole tensors of float32; not under a mask, nor of other dtypes")
    return values


def _encode_whole(params: Params, schema: Schema) -> bytes:
    """A complete float32 vector is the body as it is."""
    values, head = schema.flat(params).numpy(), whole(schema).head
    check, start = xxhash.xxh3_64(head), len(head)
    room = payload_memory.room(start + values.nbytes + CHECK.size)
    into = None if room is None else np.frombuffer(room[start : -CHECK.size], dtype=np.float32)
    if not tensor_coding.swept(check, values, into):
        tensor_coding.refuse(params, schema)
    if room is None:
        return b"".join((head, values.data, last_bytes(check)))
    room[:start], room[-CHECK.size :] = head, last_bytes(check)
    return cast(bytes, room.toreadonly())  # whoever reads a payload takes any buffer


def whole_payload(values: NDArray[np.float32], schema: Schema) -> bytes:
    """The same of finite values that lie side by side in the order of the schema."""
    head = whole(schema).head
    check = xxhash.xxh3_64(head)
    check.update(values.data)
    return b"".join((head, values.data, last_bytes(check)))


def _encode_mask(alive: Tensor | None, before: Tensor | None, schema: Schema, contexts: bool) -> tuple[int, bytes]:
    if alive is None:
        return NONE, b""
    if before is not None and torch.equal(alive, before):
        return HELD, b""
    flat, held = alive.numpy(), None if before is None else before.numpy()
    layout = schema.mask_layout
    mode, data = mask_coding.encode(flat, layout, held)
    if contexts and (smaller := mask_coding.smaller(flat, layout, len(data))) is not None:
        return MODES[mask_coding.CONTEXTS].id, smaller
    return mode, data
