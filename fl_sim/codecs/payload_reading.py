"""Reading a payload: its header is checked before anything is decoded. `payload_format` says what it consists of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from fl_sim.codecs import mask_coding, tensor_coding
from fl_sim.codecs.bits import Reader, floor_bits
from fl_sim.codecs.description import Description
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.held_model import HeldModel, held
from fl_sim.codecs.mask_coding import MODES
from fl_sim.codecs.own_coding import OWN, Own
from fl_sim.codecs.payload_format import (
    AGAINST_BASE,
    ALIGNMENT,
    CHECK,
    HEAD,
    HELD,
    MAGIC,
    MIXED,
    NAMES,
    NONE,
    TYPES,
    VERSION,
    coder_of_type,
    last_bytes,
    mixed_coder,
    names_held_mask,
    others_of,
    whole,
)
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.sections import BODY, CODEC, HEADER, KINDS, MASK, VALUE_SECTIONS
from fl_sim.codecs.value_coder import ValueCoder
from fl_sim.codecs.value_coding import BY_ID, EXACT, is_relative
from fl_sim.core.types import Mask, Params


@dataclass(frozen=True)
class Opened:
    """Payload whose header was checked, and the length of each section in its body; `known` = its description, if it is whole."""

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
    known: Description | None = None

    def section(self, name: str) -> memoryview:
        """Bytes of one section, not copied. Raises KeyError for a name that is not in `fl_sim.codecs.sections.BODY`."""
        return self._sections[name]

    @cached_property
    def _sections(self) -> dict[str, memoryview]:
        ends = list(accumulate(self.lengths.values(), initial=0))
        return {name: self.body[start:end] for name, start, end in zip(self.lengths, ends, ends[1:], strict=False)}

    @property
    def is_in_place(self) -> bool:
        """Whether the values are a complete float32 vector in memory that stays as it is, which is decoded without a copy."""
        return self.mode == NONE and self.values == EXACT and self.schema.is_flat and stays(self.data)

    @property
    def is_whole(self) -> bool:
        """Whether the bytes still have their checksum."""
        view = memoryview(self.data)
        expected: int = CHECK.unpack_from(view, len(view) - CHECK.size)[0]
        return expected == xxhash.xxh3_64_intdigest(view[: -CHECK.size]) & 0xFFFFFFFF

    def decoded(self, base: Params | None = None, own: Own | None = None) -> tuple[Params, Mask | None]:
        """See `decode`; `own` is the codec of the user's own that this receiver has."""
        if self.is_in_place:
            return self._in_place(), None
        if not self.is_whole:
            raise CorruptPayload("the checksum does not match")
        schema, alive = self.schema, _decode_mask(self)
        if self.nnz != (schema.prunable_size if alive is None else int(np.count_nonzero(alive))):
            raise CorruptPayload("the number of values is not that of the mask")
        known = held(self.base_hash, base, None if alive is None else torch.from_numpy(alive), schema)
        coder = _coder_of(self, alive, known, own)
        params = tensor_coding.decode(
            {name: self.section(name) for name in VALUE_SECTIONS},
            alive,
            schema=schema,
            coder=coder,
            count=self.nnz,
            others=others_of(known, coder),
        )
        return params, None if alive is None else schema.view_mask(torch.from_numpy(alive))

    def mask(self) -> Mask | None:
        """The mask alone: which prunable coordinates travel; None = all.

        Raises:
            CorruptPayload: as `decode`.
        """
        alive = _decode_mask(self)
        return None if alive is None else self.schema.view_mask(torch.from_numpy(alive))

    def _in_place(self) -> Params:
        """A complete float32 vector, where it lies in the payload."""
        data = memoryview(self.data)
        sizes, schema = (self.nnz, *self.lengths.values()), self.schema
        if self.known is None and sizes != (schema.prunable_size, 0, *schema.section_bytes.values()):
            raise CorruptPayload("a section has another length than the schema says")
        check = xxhash.xxh3_64(data[: self.header - CHECK.size])
        values = tensor_coding.in_place(self.body)
        finite = tensor_coding.swept(check, values)
        if data[-CHECK.size :] != last_bytes(check):
            raise CorruptPayload("the checksum does not match")
        if not finite:
            raise CorruptPayload("a value is NaN or infinite")
        return schema.view(torch.from_numpy(values))

    def described(self) -> Description:
        """See `describe`."""
        if self.known is not None:
            return self.known
        entropy = 0.0
        if self.mode > HELD:
            mode = MODES[NAMES[self.mode]]
            segments = mode.segments(Reader(self.section(MASK)), self.schema.mask_layout, self.held_mask)
            entropy = sum(floor_bits(ones, size) for ones, size in segments) / 8
        dense = dict(zip(VALUE_SECTIONS, (self.schema.section_bytes[kind] for kind in KINDS), strict=True))
        present = {name: length for name, length in self.lengths.items() if length or dense.get(name)}
        if self.values == OWN:
            present = {**present, VALUE_SECTIONS[0]: 0, CODEC: self.lengths[VALUE_SECTIONS[0]]}
        sections = present | {HEADER: self.header}
        return Description(sections, self.nnz, dense, entropy, NAMES[self.mode], self.values)


def stays(data: bytes | memoryview) -> bool:
    """Whether numbers in these bytes can be used where they lie: in `bytes`, or in a read-only view, whose owner leaves them as
    they are while there is a view; and at a place where numbers of a payload's body are aligned."""
    if not isinstance(data, memoryview):
        return True
    return data.readonly and np.frombuffer(data, dtype=np.uint8).ctypes.data % ALIGNMENT == 0


def opened(data: bytes | memoryview, *, schema: Schema, held_mask: Mask | None = None) -> Opened:
    """Check a payload's header, without decoding its values; use the result to decode and describe the payload.

    Raises:
        CorruptPayload: the header is not one of this schema and held mask.
    """
    view = memoryview(data)
    if len(view) < HEAD.size + CHECK.size:
        raise CorruptPayload("shorter than a header")
    if schema.is_flat and (usual := _opened_whole(data, view, schema)) is not None:
        return usual
    magic, version, value_id, mode, flags, schema_hash = HEAD.unpack_from(view)
    if magic != MAGIC or version != VERSION or flags & ~AGAINST_BASE:
        raise CorruptPayload(f"not a payload of version {VERSION}")
    if value_id not in TYPES or mode not in NAMES:
        raise CorruptPayload(f"unknown value type {value_id} or mask mode {mode}")
    if schema_hash != schema.hash:
        raise CorruptPayload("made for another schema: names, shapes, dtypes or their order differ")
    reader = Reader(view[: -CHECK.size], HEAD.size)
    before = None
    if names_held_mask(mode):
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


def _opened_whole(data: bytes | memoryview, view: memoryview, schema: Schema) -> Opened | None:
    """A payload that has the header of all values as float32; None = another one, or of another length."""
    head, lengths, known = whole(schema)
    start = len(head)
    if view[:start] != head or len(view) != start + schema.nbytes + CHECK.size:
        return None
    body, header = view[start : -CHECK.size], start + CHECK.size
    return Opened(data, schema, NONE, EXACT, None, schema.prunable_size, header, lengths, body, known=known)


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

    The tensors of a dense float32 payload given as `bytes`, or as a read-only view of memory that stays as it is, lie in
    `data` itself: read them, or clone them first.

    Raises:
        CorruptPayload: anything but a payload that `encode` could have made for this schema, held mask and base.
    """
    return opened(data, schema=schema, held_mask=held_mask).decoded(base)


def _coder_of(payload: Opened, alive: NDArray[np.bool_] | None, known: HeldModel | None, own: Own | None) -> ValueCoder:
    mask = None if alive is None else torch.from_numpy(alive)
    if payload.values == OWN:
        if own is None or alive is not None or not payload.schema.is_flat:
            raise CorruptPayload("coded by a codec of the user's own that this receiver does not have, or under a mask")
        return own
    if payload.values != MIXED:
        return coder_of_type(payload.values, mask, payload.schema, known)
    if not payload.schema.is_flat:
        raise CorruptPayload("a value type for each tensor, in a schema that is not float32")
    return mixed_coder(mask, payload.schema, known)


def _decode_mask(payload: Opened) -> NDArray[np.bool_] | None:
    section = payload.section(MASK)
    if payload.mode in (NONE, HELD):
        if len(section):
            raise CorruptPayload("mask bytes where none are due")
        return None if payload.held_mask is None else payload.held_mask.copy()
    return MODES[NAMES[payload.mode]].decode(Reader(section), payload.schema.mask_layout, payload.held_mask)


def describe(data: bytes | memoryview, *, schema: Schema, held_mask: Mask | None = None) -> Description:
    """Describe a payload's sections from its header and counts alone; values and mask are not decoded.

    Raises:
        CorruptPayload: the header is not one of this schema and held mask.
    """
    return opened(data, schema=schema, held_mask=held_mask).described()
