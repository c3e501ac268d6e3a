"""The ledger of a foreign Flower app: every message that moved, whatever it carries, with its round and its phase."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message

from fl_sim.codecs import Description
from fl_sim.communication.flower_private import record_bytes
from fl_sim.communication.flower_traffic import protocol_bytes
from fl_sim.communication.ledger import WORDS, Ledger
from fl_sim.communication.messages import array_bytes

Entry = tuple[int, str, str, int, int, Description, int, str]
"""(message, direction, phase, round, client, sections, protocol bytes, status)."""


@dataclass(frozen=True)
class Book:
    """Notes of the messages that moved, taken by any thread; `written` books them in the order in which they were pushed.

    Sections are "dense" (the arrays' serialised data), "config" and "metrics" (the records as Flower serialises them).
    A message is noted when a client gets it, a reply when the client gives it, pulled or not. An error reply carried
    nothing and is not booked; a reply that came after its message had expired is booked as "late".
    """

    entries: list[Entry]
    lock: threading.Lock

    @classmethod
    def empty(cls) -> Book:
        """A book without notes."""
        return cls([], threading.Lock())

    def note(self, message: Message, direction: str, *, number: int, round: int, client: int, late: bool) -> None:
        """Note one message; `number` and `round` are those of the message that it is, or that it answers."""
        if not message.has_content():
            return
        sizes = sections(message)
        description = Description(sizes, 0, {"dense": sizes["dense"]}, 0.0, "none", "none")
        size, phase = protocol_bytes(message, direction=direction), phase_of(message.metadata.message_type)
        entry = (number, direction, phase, round, client, description, size, "late" if late else "ok")
        with self.lock:
            self.entries.append(entry)

    def written(self) -> Ledger:
        """Book all notes, the same on every engine."""
        ledger = Ledger()
        for _, direction, phase, number, client, description, size, status in sorted(
            self.entries, key=lambda entry: entry[:2]
        ):
            ledger.book(
                round=number,
                direction=direction,
                phase=phase,
                client=client,
                description=description,
                protocol_bytes=size,
                status=status,
            )
        return ledger


def sections(message: Message) -> dict[str, int]:
    """Bytes of a message's arrays, configs and metrics; the last two only where there are any."""
    sizes = {"dense": array_bytes(message.content)}
    for record in message.content.values():
        if not isinstance(record, ArrayRecord):
            name = "config" if isinstance(record, ConfigRecord) else "metrics"
            sizes[name] = sizes.get(name, 0) + record_bytes(record)
    return sizes


def phase_of(message_type: str) -> str:
    """The phase of a message type: its category, or "other"."""
    category = message_type.split(".")[0]
    return category if category in WORDS["phase"] else "other"


def round_of(message: Message) -> int:
    """The round of a message: `server-round` of a config, else the group's number, else 0."""
    found = (record.get("server-round") for record in message.content.config_records.values())
    named = next((number for number in found if isinstance(number, int)), None)
    group = message.metadata.group_id
    # The ledger's rounds have 32 bits; a longer number is a name, not a round.
    numbers = (named, int(group) if group.isdecimal() and len(group) < 10 else None)
    return next((number for number in numbers if number is not None and 0 <= number < 2**31), 0)
