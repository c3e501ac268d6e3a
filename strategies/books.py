"""Booking: every message that moved, both ways, in the ledger; the masks of training messages in the recorder."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message

from fl_sim.codecs import Description
from fl_sim.communication.flower_traffic import Form, protocol_bytes
from fl_sim.core.types import Mask
from fl_sim.runtime.server_context import Setup


@dataclass(frozen=True)
class Books:
    """The books of one run; `number` is the round that a message belongs to."""

    setup: Setup

    def book(
        self,
        direction: str,
        number: int,
        client: int,
        message: Message,
        described: Description,
        *,
        phase: str,
        status: str = "ok",
        form: Form | None = None,
    ) -> None:
        """Book a message to a client (`down`) or its reply (`up`); `form` is that of its content, where it is known."""
        self.setup.ledger.book(
            round=number,
            direction=direction,
            phase=phase,
            client=client,
            description=described,
            protocol_bytes=protocol_bytes(message, direction=direction, form=form),
            status=status,
        )

    def record(self, direction: str, number: int, client: int, described: Description, mask: Mask | None) -> None:
        """Keep the mask that a training message carried, where the run records masks."""
        if self.setup.recorder is not None:
            travelled = mask if described.mask_mode not in ("none", "held") else None
            bits = None if travelled is None else self.setup.exchange.schema.flat_mask(travelled).numpy()
            self.setup.recorder.add(round=number, direction=direction, client=client, mask=bits)
