"""Flower's own traffic for a message: what its SuperLink counts as sent and received for one exchange.

A message travels as a tree of objects (message, record dict, records, arrays, chunks of 5 MiB), each named by its
SHA-256; the SuperLink adds up the objects and the protobuf bodies around them. HTTP headers come on top and are not in
its counters either. All of that depends on lengths only: Flower's classes size the tree once per structure, over
stand-ins of four bytes, and the payload's own bytes are added. No payload is copied or hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flwr.app import Array, Message, RecordDict

from fl_sim.communication.flower_private import (
    CHUNK_BYTES,
    chunk_bytes,
    envelope,
    inbound_bytes,
    is_arrays,
    outbound_bytes,
    record_kind,
    with_chunks,
)

Structure = tuple[object, ...]
_FRAMES: dict[Structure, int] = {}
_LIMIT = 4096
_STAND_IN = len("ArrayChunk  4\0") + 4
_SIZES = {"down": outbound_bytes, "up": inbound_bytes}


class Form(NamedTuple):
    """The parts of a content that its message's size depends on; shared by all messages with the same content."""

    structure: Structure
    arrays: Sequence[Array]
    chunks: int

    @classmethod
    def of(cls, content: RecordDict) -> Form:
        """The form of a content that is not changed from here on."""
        parts: list[object] = []
        arrays: list[Array] = []
        chunks = 0
        for key, record in content.items():
            parts += [key, record_kind(type(record))]
            if is_arrays(record):
                for name, array in record.items():
                    shape, size = array.shape, len(array.data)
                    parts.append((name, array.dtype, len(str(shape)), len(shape), array.stype, -(-size // CHUNK_BYTES)))
                    arrays.append(array)
                    chunks += chunk_bytes(size)
            else:
                parts += [(name, *_size(value)) for name, value in record.items()]
        return cls(tuple(parts), arrays, chunks)


def protocol_bytes(message: Message, *, direction: str, form: Form | None = None) -> int:
    """Bytes that a SuperLink accounts for `message`: "down" to the client, "up" from the client.

    `form` is that of its content, where it is known already.

    Objects of a message that repeat (two equal chunks of 5 MiB, two equal records) travel once on Flower and are counted
    here each time; encoded values do not repeat.
    """
    if message.has_error():
        return _SIZES[direction](message)
    form = form or Form.of(message.content)
    key = (direction, _envelope(message), form.structure)
    frame = _FRAMES.get(key)
    if frame is None:
        if len(_FRAMES) >= _LIMIT:
            _FRAMES.clear()
        frame = _FRAMES[key] = _frame(message, form.arrays, direction)
    return frame + form.chunks


def _frame(message: Message, arrays: Sequence[Array], direction: str) -> int:
    """Bytes of a message apart from the chunks of its arrays."""
    return _SIZES[direction](with_chunks(message, _chunks)) - sum(map(_chunks, arrays)) * _STAND_IN


def _chunks(array: Array) -> int:
    return -(-len(array.data) // CHUNK_BYTES)


def _envelope(message: Message) -> Structure:
    """Key of a frame's size: the metadata that it depends on."""
    kind, group, replied_to, ids = envelope(message)
    return (
        kind,
        len(group) if group.isascii() else len(group.encode()),
        len(replied_to),
        *[_varint(n or 0) for n in ids],
    )


def _size(value: object) -> tuple[object, ...]:
    """Key of a scalar's encoded size: its type, and its length as protobuf writes it."""
    if type(value) is float:  # most of them
        return (float,)
    if isinstance(value, (str, bytes)):
        return (type(value), len(value) if isinstance(value, bytes) else len(value.encode()))
    if isinstance(value, list):
        return (type(value), *map(repr, value))
    if isinstance(value, int) and not isinstance(value, bool):
        # Flower's integers are `sint64` (zigzag: 64 takes two bytes, 63 one) up to 2^63, and `uint64` from there.
        unsigned = value >= 2**63
        return (int, unsigned, _varint(value if unsigned else (value << 1) ^ (value >> 63)))
    return (type(value),)


def _varint(value: int) -> int:
    return (value.bit_length() + 6) // 7
