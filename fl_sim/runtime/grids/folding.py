"""Folding of replies where they are made: a worker adds up those of its clients, and sends their receipts, and one sum later.

How replies are decoded and added up is the server's business (`Folding`); this is what a Grid needs to know of it. Sums do not
depend on the order or the grouping of what is added, so that any worker may do any client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        message: the reply without its content.
        receipt: what is booked of it.
    """

    message: Message
    receipt: Receipt

    @property
    def metadata(self) -> Metadata:
        """The reply's metadata."""
        return self.message.metadata


@dataclass(frozen=True)
class HandedIn:
    """What workers have added up; it comes before the last reply of a round."""

    content: RecordDict


Reply = Message | FoldedReply
"""What comes back of a client."""


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
        self.replies += 1
        if receipt is None:
            self.payload_bytes += array_bytes(reply.content) if reply.has_content() else 0
        else:
            self.folded += 1
            self.kept_bytes += sum(receipt.described.sections.values())

    def told(self) -> str:
        """One line for the user."""
        return (
            f"{self.folded} of {self.replies} updates were added up where they were made: "
            f"{self.sums_bytes / 1e6:.3g} MB of sums came instead of {self.kept_bytes / 1e6:.3g} MB"
        )


class Folding(Protocol):
    """What a worker adds up in a round."""

    def begin(self) -> None:
        """Begin a task."""

    def add(self, reply: Message, *, must: bool) -> None:
        """Take the next client's reply; its content may be taken out of it. With `must` it is folded, and does not travel."""

    def finish(self) -> Sequence[Receipt | None]:
        """For each reply of the task its receipt; None = it travels as it is."""

    def hand_in(self, others: Sequence[RecordDict]) -> RecordDict:
        """The sum of all that was folded, and of what others have handed in; the next one begins from zero."""


Fold = Callable[[RecordDict], Folding]
"""What clients started from, where that is needed -> a worker's folding, the same for a whole round. It is pickled."""


@dataclass(frozen=True)
class Foldable:
    """What workers may fold in a round.

    Attributes:
        fold: how, for a worker that has about so many clients in the round.
        start: what it needs of the model; it travels as a broadcast does.
        nbytes: of a sum.
    """

    fold: Callable[[float], Fold]
    start: RecordDict
    nbytes: int
