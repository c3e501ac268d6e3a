"""Updates of a recorded run as pairs of models: what a client received, and what it sent back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.communication.exchange import Exchange
from fl_sim.communication.payload_log import read_round, recorded_files
from fl_sim.core.types import FlatParams, Params, UserError


@dataclass(frozen=True)
class RecordedUpdate:
    """One update.

    Attributes:
        round, client: whose.
        received: the model that the client received.
        sent: its parameters as the server knows them afterwards.
    """

    round: int
    client: int
    received: FlatParams
    sent: FlatParams

    @property
    def schema(self) -> Schema:
        """The prunable tensors, all float32."""
        return Schema.of(dict(self.sent), self.sent.names)


def recorded_updates(
    folder: Path, exchange: Exchange, initial: Params, rounds: Sequence[int]
) -> Iterator[RecordedUpdate]:
    """The prunable part of each update of these recorded rounds.

    Args:
        folder: recorded payloads of a run.
        exchange: what travelled, and how.
        initial: parameters of the seeded model, from which differences of the downlink are taken.
        rounds: which of the recorded rounds.

    Raises:
        UserError: a payload that is not of this run, or masks, which this does not read.
    """
    part = exchange.schema.prunable_part
    for number, path in recorded_files(folder):
        if number not in rounds:
            continue
        received: dict[int, FlatParams] = {}
        for message in read_round(path):
            if message.phase != "train":
                continue
            coding = exchange.downlink if message.direction == "down" else exchange.uplink
            try:
                payload = codecs.opened(message.payload, schema=exchange.schema)
                reference = initial if message.direction == "down" else received[message.client]
                params, mask = coding.restore(payload, reference)
            except (CorruptPayload, KeyError) as error:
                raise UserError(
                    f"{path}: a payload of client {message.client} cannot be read alone: {error}"
                ) from error
            if mask is not None:
                raise UserError(f"{path}: payloads under masks; record a run whose clients send all weights")
            model = exchange.schema.view(exchange.schema.flat(params).clone())
            if message.direction == "down":
                received[message.client] = model
                continue
            halves = (exchange.schema.flat(m)[: part.size] for m in (received[message.client], model))
            yield RecordedUpdate(number, message.client, *(part.view(half) for half in halves))
