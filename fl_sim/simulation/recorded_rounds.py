"""Recorded rounds of a short run, decoded: the model that the server sent, and what some of its clients uploaded.

A message can then be encoded with other settings than the run's: value types, a share of the weights, a pruning mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fl_sim import codecs
from fl_sim.communication.exchange import Coding
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.payload_log import Recorded, read_round, recorded_files
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Mask, Params, UserError
from fl_sim.simulation.model_track import ModelTrack

UPLOADS = 4
"""Uploads of a round that are decoded and encoded again: those of one round differ little in size."""
Choose = Callable[[Params, Params], Mask | None]
"""(received parameters, trained parameters) -> mask of the weights that are uploaded; None = all."""


@dataclass(frozen=True)
class RecordedRound:
    """A round whose messages were dense float32 parameters.

    Attributes:
        number: of the round.
        sent: the model that clients trained.
        updates: client -> the model that it uploaded, of up to `UPLOADS` clients.
        after: the model that clients evaluated after the round; `sent` where none did.
        tasks, evaluations, uploads: how many messages carried these.
        others: bytes of everything else, such as answers of clients that evaluated, but for what first contacts get.
    """

    number: int
    sent: Params
    updates: Mapping[int, Params]
    after: Params
    tasks: int
    evaluations: int
    uploads: int
    others: int

    @classmethod
    def of(cls, path: Path, number: int, ledger: Ledger, schema: codecs.Schema) -> RecordedRound:
        """Read a recorded round.

        Raises:
            UserError: a message was not dense, so that the run itself chose what to send; or no client uploaded.
        """
        messages = list(read_round(path))
        down = [each for each in messages if each.direction == "down"]
        tasks, ups = (
            [each for each in down if each.phase == "train"],
            [each for each in messages if each.direction == "up"],
        )
        if not tasks or not ups:
            raise UserError(f"round {number}: no client took part, so that nothing can be predicted")
        places = range(min(len(ups), UPLOADS))
        some = [ups[place * len(ups) // len(places)] for place in places]
        booked = ledger.total(where={"round": number})[()] - sum(len(each.payload) for each in messages)
        contacts = ledger.total(where={"round": number, "direction": "down", "section": "auxiliary"})[()]
        return cls(
            number,
            sent=_dense(tasks[0], number, schema),
            updates={each.client: _dense(each, number, schema) for each in some},
            after=_dense(down[-1], number, schema),
            tasks=len(tasks),
            evaluations=len(down) - len(tasks),
            uploads=len(ups),
            others=booked - contacts,
        )


def _dense(message: Recorded, number: int, schema: codecs.Schema) -> Params:
    params, mask = codecs.opened(message.payload, schema=schema, held_mask=None).decoded()
    if mask is not None:
        raise UserError(
            f"advise: client {message.client} uploads a part of its weights in round {number}: what a method chooses itself "
            "changes with the rounds and is not predicted; needed: a client that uploads all of them"
        )
    return params


def first_and_last(folder: Path, ledger: Ledger, schema: codecs.Schema) -> tuple[RecordedRound, RecordedRound]:
    """The first and the last recorded round; the same where one alone was recorded.

    Raises:
        UserError: none was recorded, since its payloads were too large.
    """
    files = recorded_files(folder)
    if not files:
        raise UserError("advise: the payloads of one round are too large to be recorded; allowed: a smaller cohort")
    first, last = (RecordedRound.of(path, number, ledger, schema) for number, path in (files[0], files[-1]))
    return first, last


@dataclass(frozen=True)
class Encoder:
    """Encodes messages of recorded rounds as a server or client with other settings would."""

    track: ModelTrack
    seed: int

    def download(
        self,
        params: Params,
        number: int,
        coding: Coding,
        *,
        sent_mask: Mask | None = None,
        held_mask: Mask | None = None,
    ) -> bytes:
        """A message of round `number` to a client that holds the pruning mask `held_mask`."""
        seed = derive(self.seed, number, Purpose.ENCODING)
        schema = self.track.exchange.schema
        return coding.encode(params, sent_mask, self.track.initial, schema=schema, held_mask=held_mask, seed=seed)

    def uploads(
        self, each: RecordedRound, coding: Coding, choose: Choose, *, held_mask: Mask | None = None
    ) -> Sequence[bytes]:
        """Messages of the clients whose updates are known."""
        schema = self.track.exchange.schema
        return [
            coding.encode(
                params,
                choose(each.sent, params),
                each.sent,
                schema=schema,
                held_mask=held_mask,
                seed=derive(self.seed, each.number, client, Purpose.CLIENT),
            )
            for client, params in each.updates.items()
        ]

    def after(
        self, each: RecordedRound, down: Coding, uploads: Sequence[bytes], up: Coding, *, mask: Mask | None = None
    ) -> Params:
        """The model that clients receive after the round: the mean of the uploads, pruned, as `down` rounds it.

        What a client did not upload counts as unchanged.
        """
        schema, sent = self.track.exchange.schema, self.track.exchange.schema.flat(each.sent)
        change = torch.zeros_like(sent)
        for data in uploads:
            params, chosen = up.decode(data, each.sent, schema=schema, held_mask=mask)
            change += _within(schema.flat(params) - sent, chosen, schema) / len(uploads)
        model = schema.view(_within(sent + change, mask, schema))
        data = self.download(model, each.number + 1, down, sent_mask=mask, held_mask=mask)
        params, _ = down.decode(data, self.track.initial, schema=schema, held_mask=mask)
        return schema.view(_within(schema.flat(params), mask, schema))


def _within(flat: Tensor, mask: Mask | None, schema: codecs.Schema) -> Tensor:
    """A copy of flat values in which prunable coordinates outside the mask are 0."""
    result = flat.clone()
    if mask is not None:
        result[: schema.prunable_size][~schema.flat_mask(mask)] = 0.0
    return result
