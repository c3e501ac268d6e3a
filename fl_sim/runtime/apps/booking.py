"""The ledger of a foreign Flower app: every message that moved, whatever it carries, with its round and its phase."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fl_sim.codecs import Description
from fl_sim.communication.flower_private import record_bytes
from fl_sim.communication.flower_traffic import Form, protocol_bytes
from fl_sim.communication.ledger import WORDS, Ledger
from fl_sim.communication.messages import array_bytes
from fl_sim.core.errors import UserError, in_one_line

Entry = tuple[int, str, str, int, int, Description, int, str]
"""(message, direction, phase, round, client, sections, protocol bytes, status)."""


class Measured(NamedTuple):
    """What the ledger has to know of a content; messages with one content share it."""

    sections: dict[str, int]
    form: Form

    @classmethod
    def of(cls, content: RecordDict) -> Measured:
        """Measure a content that is not changed from here on.

        Raises:
            UserError: a value that Flower cannot serialise.
        """
        return cls(_sections(content), Form.of(content))


class Exchange(NamedTuple):
    """A message and its reply: their number among all of the run, their round and their client."""

    number: int
    round: int
    client: int


@dataclass
class Book:
    """Notes of the messages that moved, taken by any thread; `written` books them in the order in which they were pushed.

    Sections are "dense" (the arrays' serialised data), "config" and "metrics" (the records as Flower serialises them).
    A message is noted when a client gets it, a reply when the client gives it, pulled or not. An error reply carried
    nothing and is not booked; a reply that came after its message had expired is booked as "late".
    """

    entries: list[Entry] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(
        self, message: Message, direction: str, exchange: Exchange, *, late: bool, measured: Measured | None = None
    ) -> None:
        """Note a message or its reply.

        `measured`: of its content, where that is known already.

        Raises:
            UserError: a content that Flower cannot serialise.
        """
        if not message.has_content():
            return
        sizes, form = measured or Measured.of(message.content)
        description = Description(sizes, 0, {"dense": sizes["dense"]}, 0.0, "none", "none")
        size = protocol_bytes(message, direction=direction, form=form)
        phase = phase_of(message.metadata.message_type)
        number, round_, client = exchange
        entry = (number, direction, phase, round_, client, description, size, "late" if late else "ok")
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


def _sections(content: RecordDict) -> dict[str, int]:
    """Bytes of a content's arrays, configs and metrics; the last two only where there are any."""
    sizes = {"dense": array_bytes(content)}
    for key, record in content.items():
        if not isinstance(record, ArrayRecord):
            name = "config" if isinstance(record, ConfigRecord) else "metrics"
            try:
                sizes[name] = sizes.get(name, 0) + record_bytes(record)
            except (TypeError, ValueError) as error:  # protobuf's: an integer of more than 64 bits, half a character
                raise UserError(f"Flower cannot serialise the record {key!r}: {in_one_line(error)}") from error
    return sizes


def phase_of(message_type: str) -> str:
    """The phase of a message type: its category, or "other"."""
    category = message_type.split(".")[0]
    return category if category in WORDS["phase"] else "other"


def round_of(message: Message) -> int:
    """The round of a message: `server-round` of a config, else the group's number, else 0."""
    configs = message.content.config_records.values() if message.has_content() else ()
    found = (record.get("server-round") for record in configs)
    named = next((number for number in found if isinstance(number, int)), None)
    group = message.metadata.group_id
    # The ledger's rounds have 32 bits; a longer number is a name, not a round.
    numbers = (named, int(group) if group.isdecimal() and len(group) < 10 else None)
    return next((number for number in numbers if number is not None and 0 <= number < 2**31), 0)
