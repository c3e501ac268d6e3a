"""Folding of replies where they are made: a worker adds up those of a block of clients, and sends one sum and their receipts.

How replies are decoded and added up is the server's business (`Fold`); this is what a Grid needs to know of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message, RecordDict

from fl_sim.codecs import Description
from fl_sim.communication.flower_private import Metadata
from fl_sim.communication.messages import array_bytes


@dataclass(frozen=True)
class Receipt:
    """Everything that the server books of a reply whose payload stays where it was folded.

    Attributes:
        described: the payload's sections.
        protocol_bytes: Flower's own traffic for the reply.
        num_examples: weight of the update.
        metrics: of the client.
        chosen: layer -> share of it that was sent, where the client chose; None where it did not.
        rejected: why the bytes are no update of this federation; None = the update was folded.
    """

    described: Description
    protocol_bytes: int
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    chosen: Mapping[str, float] | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class FoldedReply:
    """A reply whose payload was folded elsewhere.

    Attributes:
        message: the reply without its content. In its place the last update of a block brings the block's sums.
        receipt: what is booked of it.
    """

    message: Message
    receipt: Receipt

    @property
    def metadata(self) -> Metadata:
        """The reply's metadata."""
        return self.message.metadata


Reply = Message | FoldedReply


@dataclass
class Traffic:
    """What came back from workers so far.

    Attributes:
        replies: their number.
        folded: of them, those whose payloads stayed where they were folded.
        kept_bytes: of these payloads.
        sums_bytes: of the sums that came in their place.
        payload_bytes: of the replies that came as they were.
    """

    replies: int = 0
    folded: int = 0
    kept_bytes: int = 0
    sums_bytes: int = 0
    payload_bytes: int = 0

    def add(self, reply: Message, receipt: Receipt | None) -> None:
        """Count a reply."""
        size = array_bytes(reply.content) if reply.has_content() else 0
        self.replies += 1
        if receipt is None:
            self.payload_bytes += size
        else:
            self.folded += 1
            self.kept_bytes += sum(receipt.described.sections.values())
            self.sums_bytes += size

    def told(self) -> str:
        """One line for the user."""
        return (
            f"{self.folded} of {self.replies} updates were added up where they were made: "
            f"{self.sums_bytes / 1e6:.3g} MB of sums came instead of {self.kept_bytes / 1e6:.3g} MB"
        )


class Folding(Protocol):
    """The block that a worker is at."""

    def add(self, reply: Message) -> None:
        """Take the next client's reply; its content may be taken out of it."""

    def finish(self) -> Sequence[Receipt | None]:
        """For each reply its receipt; None = it travels as it is. The sums are in one of those with a receipt."""


class Fold(Protocol):
    """How replies are folded, the same for all blocks of a round. It is pickled."""

    def begin(self, start: RecordDict) -> Folding:
        """Begin a block; `start` is what clients started from, where that is needed."""


@dataclass(frozen=True)
class Blocks:
    """What workers may fold in a round.

    Attributes:
        fold: how.
        start: what it needs of the model; it travels as a broadcast does.
        places: of the messages, block by block.
        nbytes: of a block's sums.
    """

    fold: Fold
    start: RecordDict
    places: Sequence[range]
    nbytes: int
