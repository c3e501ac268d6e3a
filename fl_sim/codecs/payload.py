"""The payload `fl_sim.update/1`: one blob, little-endian.

    magic "FLSU" | version u8 | value type u8 | mask mode u8 | flags u8 | schema hash 8 | [held-mask hash 8] | [base hash 8]
    LEB128: values sent, then bytes of mask, values, dense, buffers, auxiliary; zeros up to a multiple of 4
    mask | values | dense | buffers | auxiliary | checksum u32 (XXH3 of everything before)

Mask modes: 0 no mask, all values are there; 1 the held mask; 2.. `mask_coding.MODES`. The held-mask hash is there in modes
1, 4 and 5. Flag 1: the payload codes against a base, the model that the receiver holds and that the base hash names. A value
type, or one for each tensor (number 7), applies to the prunable values; everything else travels exactly, compressed where
the values are. Payloads of other versions are refused: in version 2 scales of integers crossed tensors, in version 3 integers
were coded another way.
The checksum guards against accidents; an adversary can always encode legal values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.codecs import mask_coding, tensor_coding
from fl_sim.codecs.bits import Reader, floor_bits, varint
from fl_sim.codecs.description import Description
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.held_model import HeldModel, held
from fl_sim.codecs.mask_coding import MODES, Layout
from fl_sim.codecs.mixed_coding import Mixed
from fl_sim.codecs.plane_coding import raw
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.sections import BODY, HEADER, KINDS, MASK, VALUE_SECTIONS
from fl_sim.codecs.value_coder import Counts, ValueCoder, Values
from fl_sim.codecs.value_coding import BY_ID, BY_TENSOR, EXACT, VALUES, fitted, is_relative
from fl_sim.core.types import Mask, Params

HEAD = struct.Struct("<4sBBBB8s")
CHECK = struct.Struct("<I")
MAGIC, VERSION = b"FLSU", 4
NONE, HELD = 0, 1
AGAINST_BASE = 1
"""Flag of a payload that codes against the model that the receiver holds."""
ALIGNMENT = 4
"""The body starts at a multiple of this, so that a dense payload's values can be used where they lie."""
NAMES = {NONE: "none", HELD: "held", **{mode.id: name for name, mode in MODES.items()}}
MIXED = "mixed"
TYPES = {**BY_ID, Mixed.id: MIXED}


def _layout(schema: Schema) -> Layout:
    count = len(schema.prunable)
    return tuple(
        (shape[0] if len(shape) else 1, size, shape[2:].numel())
        for shape, size in zip(schema.shapes[:count], schema.numels[:count], strict=True)
    )


def encode(
    params: Params,
    sent_mask: Mask | None,
    *,
    schema: Schema,
    held_mask: Mask | None = None,
    values: str | Sequence[str] = "float32",
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
        values: value type of the prunable float32 values, a name of `VALUES`; or one for each prunable tensor. Tensors of
            other dtypes travel exactly, whatever the value type; a run has none, because its entries travel as float32.
        seed: feeds the stochastic rounding of integers.
        base: the model that the receiver holds, bit for bit, for the value types that code against it.
        contexts: whether the mask is also coded in contexts, which takes longer, and sent so where that is smaller.

    Raises:
        ValueError: NaN or infinity (named), a value beyond the value type's range, a name or shape not in the schema, or a
            value type that codes against a base where none is given.
    """
    alive = None if sent_mask is None else schema.flat_mask(sent_mask)
    types = (values,) if isinstance(values, str) else tuple(values)
    relative = schema.is_flat and any(name in VALUES and is_relative(name) for name in types)
    known = HeldModel.of(base, alive, schema) if relative and base is not None else None
    coder = _coder(values, alive, schema, known) if isinstance(values, str) else _mixed(alive, schema, known, types)
    before = None if held_mask is None else schema.flat_mask(held_mask)
    mode, mask_bytes = _encode_mask(alive, before, schema, contexts)
    head = HEAD.pack(MAGIC, VERSION, coder.id, mode, 0 if known is None else AGAINST_BASE, schema.hash)
    if before is not None and _is_relative(mode):
        head += mask_coding.flat_hash(before)
    if known is not None:
        head += known.hash
    if alive is None and coder.id == VALUES[EXACT].id and schema.is_flat:
        return _encode_dense(head, params, schema)
    sent = schema.prunable_size if alive is None else int(np.count_nonzero(alive.numpy()))
    parts = [
        mask_bytes,
        *tensor_coding.encode(params, alive, schema=schema, coder=coder, seed=seed, others=_others(known, coder)),
    ]
    head = _with_lengths(head, sent, map(len, parts))
    check = xxhash.xxh3_64(head)
    for part in parts:
        check.update(part)
    return b"".join([head, *parts, _last(check)])


def _encode_dense(head: bytes, params: Params, schema: Schema) -> bytes:
    """A complete float32 vector is the body as it is."""
    values = schema.flat(params).numpy()
    head = _with_lengths(head, schema.prunable_size, (0, *schema.section_bytes.values()))
    check = xxhash.xxh3_64(head)
    if not tensor_coding.swept(check, values):
        tensor_coding.refuse(params, schema)
    return b"".join([head, raw(values), _last(check)])


def _with_lengths(head: bytes, sent: int, lengths: Iterable[int]) -> bytes:
    head += b"".join(map(varint, (sent, *lengths)))
    return head + bytes(-len(head) % ALIGNMENT)


def _last(check: xxhash.xxh3_64) -> bytes:
    return CHECK.pack(check.intdigest() & 0xFFFFFFFF)


def _is_relative(mode: int) -> bool:
    return mode == HELD or (mode > HELD and MODES[NAMES[mode]].relative)


def _others(known: HeldModel | None, coder: ValueCoder) -> Values | None:
    """What tensors that are not prunable are coded against: beside a type for each tensor, nothing."""
    return None if known is None or coder.id == Mixed.id else known.others


def _mixed(alive: Tensor | None, schema: Schema, known: HeldModel | None, types: tuple[str, ...] = ()) -> Mixed:
    if not schema.is_flat:
        raise ValueError("a value type for each tensor needs a schema of float32 only")
    return Mixed(_counts(alive, schema), types, None if known is None else known.sent)


def _counts(alive: Tensor | None, schema: Schema) -> Counts:
    """Sent values of each prunable tensor."""
    sizes = schema.numels[: len(schema.prunable)]
    return sizes if alive is None else tuple(int(part.count_nonzero()) for part in alive.split(list(sizes)))


def _coder(values: str, alive: Tensor | None, schema: Schema, known: HeldModel | None) -> ValueCoder:
    coder = VALUES[values]
    if not schema.is_flat or not isinstance(coder, BY_TENSOR):
        return coder
    return fitted(values, _counts(alive, schema), None if known is None else known.sent)


def _encode_mask(alive: Tensor | None, before: Tensor | None, schema: Schema, contexts: bool) -> tuple[int, bytes]:
    if alive is None:
        return NONE, b""
    if before is not None and torch.equal(alive, before):
        return HELD, b""
    flat, held = alive.numpy(), None if before is None else before.numpy()
    layout = _layout(schema)
    name = mask_coding.choose(flat, layout, held)
    data = MODES[name].encode(flat, layout, held)
    if contexts and (smaller := mask_coding.smaller(flat, layout, len(data))) is not None:
        return MODES[mask_coding.CONTEXTS].id, smaller
    return MODES[name].id, data


@dataclass(frozen=True)
class Opened:
    """Payload whose header was checked, and the length of each section in its body."""

    data: bytes | memoryview
    schema: Schema
    mode: int
    values: str
    held_mask: NDArray[np.bool_] | None
    nnz: int
    header: int
    lengths: dict[str, int]
    body: memoryview
    base_hash: bytes | None = None

    def section(self, name: str) -> memoryview:
        """Bytes of one section, not copied. Raises KeyError for a name that is not in `fl_sim.codecs.sections.BODY`."""
        start = 0
        for other, length in self.lengths.items():
            if other == name:
                return self.body[start : start + length]
            start += length
        raise KeyError(name)

    def decoded(self, base: Params | None = None) -> tuple[Params, Mask | None]:
        """See `decode`."""
        if self.mode == NONE and self.values == EXACT and self.schema.is_flat and type(self.data) is bytes:
            return self._in_place(self.data), None
        view = memoryview(self.data)
        if view[-CHECK.size :] != _last(xxhash.xxh3_64(view[: -CHECK.size])):
            raise CorruptPayload("the checksum does not match")
        schema, alive = self.schema, _decode_mask(self)
        if self.nnz != (schema.prunable_size if alive is None else int(np.count_nonzero(alive))):
            raise CorruptPayload("the number of values is not that of the mask")
        known = held(self.base_hash, base, None if alive is None else torch.from_numpy(alive), schema)
        coder = _coder_of(self, alive, known)
        params = tensor_coding.decode(
            {name: self.section(name) for name in VALUE_SECTIONS},
            alive,
            schema=schema,
            coder=coder,
            count=self.nnz,
            others=_others(known, coder),
        )
        return params, None if alive is None else schema.view_mask(torch.from_numpy(alive))

    def mask(self) -> Mask | None:
        """The mask alone: which prunable coordinates travel; None = all.

        Raises:
            CorruptPayload: as `decode`.
        """
        alive = _decode_mask(self)
        return None if alive is None else self.schema.view_mask(torch.from_numpy(alive))

    def _in_place(self, data: bytes) -> Params:
        """A complete float32 vector, where it lies in the payload."""
        sizes, schema = (self.nnz, *self.lengths.values()), self.schema
        if sizes != (schema.prunable_size, 0, *schema.section_bytes.values()):
            raise CorruptPayload("a section has another length than the schema says")
        check = xxhash.xxh3_64(data[: self.header - CHECK.size])
        values = tensor_coding.in_place(self.body)
        finite = tensor_coding.swept(check, values)
        if data[-CHECK.size :] != _last(check):
            raise CorruptPayload("the checksum does not match")
        if not finite:
            raise CorruptPayload("a value is NaN or infinite")
        return schema.view(torch.from_numpy(values))

    def described(self) -> Description:
        """See `describe`."""
        entropy = 0.0
        if self.mode > HELD:
            mode = MODES[NAMES[self.mode]]
            segments = mode.segments(Reader(self.section(MASK)), _layout(self.schema), self.held_mask)
            entropy = sum(floor_bits(ones, size) for ones, size in segments) / 8
        dense = dict(zip(VALUE_SECTIONS, (self.schema.section_bytes[kind] for kind in KINDS), strict=True))
        present = {name: length for name, length in self.lengths.items() if length or dense.get(name)}
        sections = present | {HEADER: self.header}
        return Description(sections, self.nnz, dense, entropy, NAMES[self.mode], self.values)


def opened(data: bytes | memoryview, *, schema: Schema, held_mask: Mask | None = None) -> Opened:
    """Check a payload's header, without decoding its values; use the result to decode and describe the payload.

    Raises:
        CorruptPayload: the header is not one of this schema and held mask.
    """
    view = memoryview(data)
    if len(view) < HEAD.size + CHECK.size:
        raise CorruptPayload("shorter than a header")
    magic, version, value_id, mode, flags, schema_hash = HEAD.unpack_from(view)
    if magic != MAGIC or version != VERSION or flags & ~AGAINST_BASE:
        raise CorruptPayload(f"not a payload of version {VERSION}")
    if value_id not in TYPES or mode not in NAMES:
        raise CorruptPayload(f"unknown value type {value_id} or mask mode {mode}")
    if schema_hash != schema.hash:
        raise CorruptPayload("made for another schema: names, shapes, dtypes or their order differ")
    reader = Reader(view[: -CHECK.size], HEAD.size)
    before = None
    if _is_relative(mode):
        before = _held(view, schema, held_mask)
        reader.at += 8
    base = _named_base(view, reader, TYPES[value_id], schema) if flags & AGAINST_BASE else None
    if base is None and schema.is_flat and value_id in BY_ID and is_relative(BY_ID[value_id]):
        raise CorruptPayload("codes against a model that it does not name")
    nnz = reader.varint(schema.prunable_size)
    lengths = {name: reader.varint(len(view)) for name in BODY}
    padding = -reader.at % ALIGNMENT
    if any(view[reader.at : reader.at + padding]):
        raise CorruptPayload("the header's padding is not zero")
    reader.at += padding
    if reader.at + sum(lengths.values()) + CHECK.size != len(view):
        raise CorruptPayload("section lengths do not add up to the payload")
    header, body = reader.at + CHECK.size, view[reader.at : -CHECK.size]
    return Opened(data, schema, mode, TYPES[value_id], before, nnz, header, lengths, body, base)


def _named_base(view: memoryview, reader: Reader, values: str, schema: Schema) -> bytes:
    """The hash of the base that the header names."""
    if not schema.is_flat or not (values == MIXED or is_relative(values)):
        raise CorruptPayload("names a model that it does not code against")
    named = bytes(view[reader.at : reader.at + 8])
    reader.at += 8
    return named


def _held(view: memoryview, schema: Schema, held_mask: Mask | None) -> NDArray[np.bool_]:
    if held_mask is None:
        raise CorruptPayload("refers to a held mask, and none is held")
    flat = schema.flat_mask(held_mask)
    if bytes(view[HEAD.size : HEAD.size + 8]) != mask_coding.flat_hash(flat):
        raise CorruptPayload("refers to another mask than the one that is held")
    return flat.numpy()


def decode(
    data: bytes | memoryview, *, schema: Schema, held_mask: Mask | None = None, base: Params | None = None
) -> tuple[Params, Mask | None]:
    """Decode a payload into (parameters, mask); coordinates outside the mask are 0. Flat dicts for a float32 schema.

    The tensors of a dense float32 payload given as `bytes` lie in `data` itself: read them, or clone them first.

    Raises:
        CorruptPayload: anything but a payload that `encode` could have made for this schema, held mask and base.
    """
    return opened(data, schema=schema, held_mask=held_mask).decoded(base)


def _coder_of(payload: Opened, alive: NDArray[np.bool_] | None, known: HeldModel | None) -> ValueCoder:
    mask = None if alive is None else torch.from_numpy(alive)
    if payload.values != MIXED:
        return _coder(payload.values, mask, payload.schema, known)
    if not payload.schema.is_flat:
        raise CorruptPayload("a value type for each tensor, in a schema that is not float32")
    return _mixed(mask, payload.schema, known)


def _decode_mask(payload: Opened) -> NDArray[np.bool_] | None:
    section = payload.section(MASK)
    if payload.mode in (NONE, HELD):
        if len(section):
            raise CorruptPayload("mask bytes where none are due")
        return None if payload.held_mask is None else payload.held_mask.copy()
    return MODES[NAMES[payload.mode]].decode(Reader(section), _layout(payload.schema), payload.held_mask)


def describe(data: bytes | memoryview, *, schema: Schema, held_mask: Mask | None = None) -> Description:
    """Describe a payload's sections from its header and counts alone; values and mask are not decoded.

    Raises:
        CorruptPayload: the header is not one of this schema and held mask.
    """
    return opened(data, schema=schema, held_mask=held_mask).described()
