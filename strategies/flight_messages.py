"""Replies that are under way: what their bytes and samples cost, and as bytes of a checkpoint."""

from __future__ import annotations

import json

from flwr.app import Error, Message, MessageType, MetricRecord, RecordDict

from fl_sim.codecs import CorruptPayload
from fl_sim.communication import messages as wire
from fl_sim.communication.flower_private import reply_to, set_message_id
from fl_sim.runtime.server_context import FlightSnapshot


def work(reply: Message) -> tuple[int, float]:
    """(bytes of a reply's payloads, samples that its client trained on); an error takes no time beside the links'."""
    if reply.has_error():
        return 0, 0.0
    try:
        count, metrics = wire.read_metrics(reply.content)
    except CorruptPayload:
        count, metrics = 0, {}
    return wire.array_bytes(reply.content), metrics.get("examples", float(count))


def packed(reply: Message | None) -> bytes:
    """A reply as bytes: the length of a JSON text, the text, the payload, those of extra tensors."""
    assert reply is not None
    told: dict[str, object]
    if reply.has_error():
        told, parts = {"error": [reply.error.code, reply.error.reason or ""]}, [b""]
    else:
        record, extra = reply.content[wire.METRICS], wire.extra_payloads(reply.content)
        assert isinstance(record, MetricRecord)
        told = {"metrics": dict(record), "extra": {name: len(data) for name, data in extra.items()}}
        parts = [bytes(wire.payload(reply.content)), *map(bytes, extra.values())]
    text = json.dumps(told).encode()
    return b"".join([len(text).to_bytes(4, "little"), text, *parts])


def unpacked(saved: FlightSnapshot, node: int) -> Message:
    """Invert `packed`, as the reply to the task that it answered.

    Raises:
        ValueError, LookupError: bytes that no run wrote.
    """
    size = int.from_bytes(saved.reply[:4], "little")
    told, data = json.loads(saved.reply[4 : 4 + size]), saved.reply[4 + size :]
    task = Message(RecordDict(), node, MessageType.TRAIN, group_id=str(saved.version + 1))
    set_message_id(task, saved.message_id)
    if "error" in told:
        code, reason = told["error"]
        reply = Message(Error(int(code), str(reason)), reply_to=task)
    else:
        extra: dict[str, bytes] = {}
        for name, length in reversed(told.get("extra", {}).items()):
            data, extra[name] = data[: len(data) - length], data[len(data) - length :]
        content = wire.content(data, metrics=told["metrics"], extra=dict(reversed(extra.items())))
        reply = reply_to(task, content)
    set_message_id(reply, f"r{saved.message_id}")
    return reply
