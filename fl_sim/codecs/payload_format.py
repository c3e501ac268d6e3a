"""The payload `fl_sim.update/1`: one blob, little-endian.

    magic "FLSU" | version u8 | value type u8 | mask mode u8 | flags u8 | schema hash 8 | [held-mask hash 8] | [base hash 8]
    LEB128: values sent, then bytes of mask, values, dense, buffers, auxiliary; zeros up to a multiple of 4
    mask | values | dense | buffers | auxiliary | checksum u32 (XXH3 of everything before)

Mask modes: 0 no mask, all values are there; 1 the held mask; 2.. `mask_coding.MODES`. The held-mask hash is there in modes
1, 4 and 5. Flag 1: the payload codes against a base, the model that the receiver holds and that the base hash names. A value
type, one for each tensor (number 7) or a codec of the user's own (number 16) applies to the prunable values; everything
else travels exactly, compressed where the values are. Payloads of other versions are refused: in version 2 scales of integers
crossed tensors, in versions 3 and 4 integers were coded another way, in version 5 exact changes.
The checksum guards against accidents; an adversary can always encode legal values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import xxhash
from torch import Tensor

from fl_sim.codecs.bits import varint
from fl_sim.codecs.description import Description
from fl_sim.codecs.held_model import HeldModel
from fl_sim.codecs.mask_coding import MODES
from fl_sim.codecs.mixed_coding import Mixed
from fl_sim.codecs.own_coding import OWN, Own
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.sections import BODY, HEADER, VALUE_SECTIONS
from fl_sim.codecs.value_coder import Counts, ValueCoder, Values
from fl_sim.codecs.value_coding import BY_ID, BY_TENSOR, EXACT, VALUES, fitted

HEAD = struct.Struct("<4sBBBB8s")
CHECK = struct.Struct("<I")
MAGIC, VERSION = b"FLSU", 6
NONE, HELD = 0, 1
AGAINST_BASE = 1
"""Flag of a payload that codes against the model that the receiver holds."""
ALIGNMENT = 4
"""The body starts at a multiple of this, so that a dense payload's values can be used where they lie."""
NAMES = {NONE: "none", HELD: "held", **{mode.id: name for name, mode in MODES.items()}}
MIXED = "mixed"
TYPES = {**BY_ID, Mixed.id: MIXED, Own.id: OWN}


def with_lengths(head: bytes, sent: int, lengths: Iterable[int]) -> bytes:
    """A header with the number of values sent and the bytes of each section, padded."""
    head += b"".join(map(varint, (sent, *lengths)))
    return head + bytes(-len(head) % ALIGNMENT)


class Whole(NamedTuple):
    """What all payloads of a schema have in common that carry every value as float32, without a mask: all but the values.

    Attributes:
        head: their header.
        lengths: bytes of each section of their body.
        described: their description.
    """

    head: bytes
    lengths: dict[str, int]
    described: Description


def whole(schema: Schema) -> Whole:
    """Of a schema of float32; made once, as a small model's header takes as long to write and to read as its values."""
    return _whole(schema.hash, schema.prunable_size, tuple(schema.section_bytes.values()))


@lru_cache(maxsize=256)
def _whole(schema_hash: bytes, values: int, sizes: tuple[int, ...]) -> Whole:
    head = HEAD.pack(MAGIC, VERSION, VALUES[EXACT].id, NONE, 0, schema_hash)
    lengths = dict(zip(BODY, (0, *sizes), strict=True))
    head = with_lengths(head, values, lengths.values())
    dense = dict(zip(VALUE_SECTIONS, sizes, strict=True))
    sections = {name: size for name, size in lengths.items() if size} | {HEADER: len(head) + CHECK.size}
    return Whole(head, lengths, Description(sections, values, dense, 0.0, NAMES[NONE], EXACT))


def last_bytes(check: xxhash.xxh3_64) -> bytes:
    """The checksum at the end of a payload."""
    return CHECK.pack(check.intdigest() & 0xFFFFFFFF)


def names_held_mask(mode: int) -> bool:
    """Whether a mask mode codes against the mask that the receiver holds."""
    return mode == HELD or (mode > HELD and MODES[NAMES[mode]].relative)


def others_of(known: HeldModel | None, coder: ValueCoder) -> Values | None:
    """What tensors that are not prunable are coded against: beside a type for each tensor, nothing."""
    return None if known is None or coder.id == Mixed.id else known.others


def mixed_coder(alive: Tensor | None, schema: Schema, known: HeldModel | None, types: tuple[str, ...] = ()) -> Mixed:
    """The coder of a type for each tensor. Raises ValueError for a schema of other dtypes than float32."""
    if not schema.is_flat:
        raise ValueError("a value type for each tensor needs a schema of float32 only")
    return Mixed(_counts(alive, schema), types, None if known is None else known.sent)


def _counts(alive: Tensor | None, schema: Schema) -> Counts:
    """Sent values of each prunable tensor."""
    sizes = schema.numels[: len(schema.prunable)]
    return sizes if alive is None else tuple(int(part.count_nonzero()) for part in alive.split(list(sizes)))


def coder_of_type(values: str, alive: Tensor | None, schema: Schema, known: HeldModel | None) -> ValueCoder:
    """The coder of one type for all tensors. Raises ValueError where it codes against a model and none is known."""
    coder = VALUES[values]
    if not schema.is_flat or not isinstance(coder, BY_TENSOR):
        return coder
    return fitted(values, _counts(alive, schema), None if known is None else known.sent)
