"""Flower's own traffic for a message: what its SuperLink counts as sent and received for one exchange.

A message travels as a tree of objects (message, record dict, records, arrays, chunks of 5 MiB), each named by its
SHA-256; the SuperLink adds up the objects and the protobuf bodies around them. HTTP headers come on top and are not in
its counters either. The size depends on lengths only, so it is computed once per structure and remembered.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, MetricRecord

from fl_sim.runtime.flower_compat import inbound_bytes, outbound_bytes

Structure = tuple[object, ...]
_KNOWN: dict[Structure, int] = {}
_LIMIT = 4096


def protocol_bytes(message: Message, *, direction: str) -> int:
    """Bytes that a SuperLink accounts for `message`: "down" to the client, "up" from the client.

    Identical chunks of one payload travel once on Flower; that is not modelled, and encoded values do not repeat.
    """
    key = (direction, *_structure(message))
    known = _KNOWN.get(key)
    if known is None:
        if len(_KNOWN) >= _LIMIT:
            _KNOWN.clear()
        known = _KNOWN[key] = {"down": outbound_bytes, "up": inbound_bytes}[direction](message)
    return known


def _structure(message: Message) -> Structure:
    """Everything that the size depends on."""
    meta = message.metadata
    parts: list[object] = [meta.message_type, len(meta.group_id), len(meta.message_id), len(meta.reply_to_message_id)]
    if message.has_error():
        return (*parts, len(message.error.reason or ""))
    for key, record in message.content.items():
        parts.append(key)
        if isinstance(record, (ConfigRecord, MetricRecord)):
            parts += [(name, _size(value)) for name, value in record.items()]
        else:
            parts += [(name, array.dtype, array.shape, array.stype, len(array.data)) for name, array in record.items()]
    return tuple(parts)


def _size(value: object) -> object:
    """What of a scalar its encoded size depends on."""
    if isinstance(value, bool) or not isinstance(value, int):
        return len(value) if isinstance(value, (str, bytes, list)) else type(value).__name__
    return 10 if value < 0 else max(1, -(-value.bit_length() // 7))
