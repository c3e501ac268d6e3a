"""Booking: writes every message, both ways, into the ledger; masks and payloads into the recorders of a run that has them."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message

from fl_sim.codecs import Description, Schema
from fl_sim.communication.flower_traffic import Form, protocol_bytes
from fl_sim.core.types import Mask
from fl_sim.runtime.server_context import Accounting


@dataclass(frozen=True)
class Booking:
    """Writes into the ledger of a run.

    Attributes:
        accounting: ledger and recorders.
        schema: of the model whose messages are booked.
    """

    accounting: Accounting
    schema: Schema

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
        size: int | None = None,
    ) -> None:
        """Book a message to a client (`down`) or its reply (`up`) in round `number`.

        `form` is its content's, `size` Flower's own traffic for it, where one of them is known.
        """
        self.accounting.ledger.book(
            round=number,
            direction=direction,
            phase=phase,
            client=client,
            description=described,
            protocol_bytes=protocol_bytes(message, direction=direction, form=form) if size is None else size,
            status=status,
        )

    def record(self, direction: str, number: int, client: int, described: Description, sent_mask: Mask | None) -> None:
        """Record the mask that a training message carried, where the run records masks."""
        recorder = self.accounting.recorder
        if recorder is not None:
            travelled = sent_mask if described.mask_mode not in ("none", "held") else None
            bits = None if travelled is None else self.schema.flat_mask(travelled).numpy()
            recorder.add(round=number, direction=direction, client=client, mask=bits)

    def keep(
        self, direction: str, number: int, client: int, payload: bytes | memoryview, held: Mask | None, *, phase: str
    ) -> None:
        """Record a payload and the mask that its receiver held, where the run records payloads."""
        payloads = self.accounting.payloads
        if payloads is not None:
            bits = None if held is None else self.schema.flat_mask(held).numpy()
            payloads.add(round=number, direction=direction, phase=phase, client=client, payload=payload, held=bits)
