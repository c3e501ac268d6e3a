"""Encode again what a finished run moved, under other codecs, without training again.

Every number of a replay is the length of bytes that were encoded, or was booked when the run moved it. Nothing is priced by
a formula. From recorded payloads (`wire.record_payloads`) a message is decoded to its tensors and encoded as a client or
server with the other coding would have: values, mask, dense tensors, buffers and header, with the seed of that client's
round. From recorded masks (`wire.record_masks`) only the masks can be encoded in another way.

What a replay cannot know: under a lossy codec clients receive and train other models, so the tensors of later rounds
differ a little from those of a run that used the codec from the start. Extra tensors of a method are not recorded and count as
measured.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Opened, Schema
from fl_sim.codecs.sections import is_extra
from fl_sim.communication.exchange import CONTENTS, Coding, Exchange
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import Bits, RecordedMask
from fl_sim.communication.payload_log import Recorded, read_round, recorded_files
from fl_sim.core.lookup import find
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import FlatMask, Params, UserError

OURS = "fl_sim"
Sections = dict[tuple[str, str], int]
"""(direction, section) -> bytes."""


def _ours(mask: Bits, coded: int) -> int:
    """The mask codec of this package, as the payload was encoded: the smallest of its modes for each mask."""
    return coded


def _coo(mask: Bits, coded: int) -> int:
    """Positions as int32."""
    return len(np.flatnonzero(mask).astype("<i4").tobytes())


def _bitmap(mask: Bits, coded: int) -> int:
    """A plain bitmap: one bit a weight."""
    return len(np.packbits(mask).tobytes())


def _free(mask: Bits, coded: int) -> int:
    """Not counted at all, as in many papers."""
    return 0


MASKS: Mapping[str, Callable[[Bits, int], int]] = {OURS: _ours, "coo": _coo, "bitmap": _bitmap, "free": _free}
"""(a mask that travelled, its bytes in the codec of this package) -> its bytes in another codec.

A mask that the receiver holds does not travel, whichever codec is chosen.
"""


@dataclass(frozen=True)
class Recoding:
    """What takes the place of a run's codecs.

    Attributes:
        uplink, downlink: encoding of each direction.
        mask: a name of `MASKS`.
    """

    uplink: Coding
    downlink: Coding
    mask: str = OURS

    def __post_init__(self) -> None:
        find("--mask", self.mask, MASKS)


@dataclass(frozen=True)
class Replayed:
    """Bytes by direction and section, as measured and as encoded again.

    Attributes:
        measured, replayed: of all messages of `rounds`; messages that carry no tensors of the model count in both as measured.
        rounds: the rounds that were replayed, in order.
    """

    measured: Sections
    replayed: Sections
    rounds: tuple[int, ...]

    def total(self, direction: str, *, replayed: bool = True) -> int:
        """All bytes of a direction."""
        table = self.replayed if replayed else self.measured
        return sum(size for (way, _), size in table.items() if way == direction)


@dataclass(frozen=True)
class Link:
    """How one model of the run travelled.

    Attributes:
        exchange: what travels and how it was encoded.
        initial: parameters of the seeded model, from which differences of the downlink are taken.
        seed: of the run.
        broadcast: whether the downlink was a sparse broadcast, which is left as it was.
    """

    exchange: Exchange
    initial: Params
    seed: int
    broadcast: bool = False


# -- from recorded payloads --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    """Sections of a message in bytes, as it moved and under the other codec; what its receiver decoded, where it is needed."""

    before: dict[str, int]
    after: dict[str, int]
    params: Params | None


@dataclass
class _Round:
    """Replay of one round: what each client received in it, for the differences that it sent.

    Attributes:
        states: client -> what the other codec, where it is one of the user's own, keeps of it from round to round; below 0,
            what it keeps of the server, model by model.
        received: client -> parameters.
    """

    number: int
    links: Sequence[Link]
    recoding: Recoding
    where: Path
    states: dict[int, Params] = field(default_factory=dict)
    received: dict[int, Params] = field(default_factory=dict)
    _done: dict[tuple[bytes, bytes | None], _Encoded] = field(default_factory=dict)

    def sections(self, message: Recorded) -> _Encoded:
        """The message as it was encoded and under the other codec.

        Raises:
            UserError: the payload is not of this run, or what the other codec needs was not recorded.
        """
        if message.direction == "up":
            return self._sections(message)
        key = message.payload, message.held  # clients that hold the same mask share a payload: it is encoded once
        if key not in self._done:
            self._done[key] = self._sections(message)
        if (params := self._done[key].params) is not None and message.phase == "train":
            self.received[message.client] = params
        return self._done[key]

    def _sections(self, message: Recorded) -> _Encoded:
        try:
            link, payload = self._opened(message)
            return self._under(message, link, payload)
        except CorruptPayload as error:
            raise UserError(f"{self.where}: a payload is not of this run: {error}") from error
        except ValueError as error:  # a value beyond the range of float16
            raise UserError(f"{self.where}: client {message.client}: {error}") from error

    def _opened(self, message: Recorded) -> tuple[Link, Opened]:
        problem: CorruptPayload | None = None
        for link in self.links:
            try:
                schema = link.exchange.schema
                return link, codecs.opened(message.payload, schema=schema, held_mask=_mask(message.held, schema))
            except CorruptPayload as error:
                problem = error
        assert problem is not None
        raise problem

    def _under(self, message: Recorded, link: Link, payload: Opened) -> _Encoded:
        before = dict(payload.described().sections)
        if message.direction == "up":
            was, new = link.exchange.uplink, self.recoding.uplink
            reference = self.received.get(message.client, link.initial)
            seed = derive(link.seed, self.number, message.client, Purpose.CLIENT)
            params = None
        else:
            was, new, reference = link.exchange.downlink, self.recoding.downlink, link.initial
            seed = derive(link.seed, self.number, Purpose.ENCODING)
            up = self.recoding.uplink
            wanted = up.content != link.exchange.uplink.content or codecs.is_relative(up.values)
            params = was.restore(payload, link.initial)[0] if wanted else None
        after = before
        if new != was:
            self._require_exact(payload, new, message.direction)
            schema, held = link.exchange.schema, _mask(message.held, link.exchange.schema)
            values, mask = was.decoded(payload, reference)
            if was.content != new.content:
                values = schema.view(_meaning(schema.flat(values), schema.flat(reference), was.content, new.content))
            data = new.encoded(
                values,
                mask,
                reference,
                schema=schema,
                held_mask=held,
                seed=seed,
                state=self._state(message, link),
            )
            after = dict(codecs.describe(data, schema=schema, held_mask=held).sections)
        return _Encoded(before, self._with_mask(after, payload), params)

    def _state(self, message: Recorded, link: Link) -> Params:
        """What the codec keeps of the sender; only tasks of training go on with what the server has."""
        if message.direction == "up":
            return self.states.setdefault(message.client, {})
        kept = self.states.setdefault(-1 - next(n for n, each in enumerate(self.links) if each is link), {})
        return kept if message.phase == "train" else dict(kept)

    def _require_exact(self, payload: Opened, new: Coding, direction: str) -> None:
        """Refuse to encode values that were rounded before; float32 takes four bytes whatever the values are."""
        if payload.values not in codecs.LOSSLESS and not new.is_plain:
            raise UserError(
                f"{self.where}: the {direction}link moved {payload.values}, and what that rounded away was not recorded; "
                f"record a run with wire.{direction}link.values = 'float32', allowed here: the run's own type or float32"
            )

    def _with_mask(self, sections: dict[str, int], payload: Opened) -> dict[str, int]:
        if self.recoding.mask == OURS or not sections.get("mask"):
            return sections
        mask = payload.mask()
        assert mask is not None
        bits = payload.schema.flat_mask(mask).numpy()
        return {**sections, "mask": MASKS[self.recoding.mask](bits, sections["mask"])}


def _meaning(values: Tensor, reference: Tensor, was: str, new: str) -> Tensor:
    """Flat values of one content (`CONTENTS`) as those of another."""
    incoming, outgoing = CONTENTS[was].incoming, CONTENTS[new].outgoing
    whole = values if incoming is None else incoming(values, reference)
    return whole if outgoing is None else outgoing(whole, reference)


def _mask(packed: bytes | None, schema: Schema) -> FlatMask | None:
    if packed is None:
        return None
    if len(packed) != -(-schema.prunable_size // 8):
        raise CorruptPayload("a held mask of another size")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=schema.prunable_size).view(np.bool_)
    return schema.view_mask(torch.from_numpy(bits))


Booked = dict[str, dict[str, int | float | str]]
"""One message of the ledger: section -> its row."""


def _booked(ledger: Ledger, rounds: frozenset[int]) -> dict[tuple[object, ...], deque[Booked]]:
    """(round, direction, phase, client) -> its messages that the ledger has, in order."""
    found: dict[tuple[object, ...], deque[Booked]] = defaultdict(deque)
    for phase in ("train", "evaluate", "query"):
        for message in ledger.by_message(phase=phase):
            row = message["header"]
            if row["round"] in rounds:
                found[row["round"], row["direction"], phase, row["client"]].append(message)
    return found


def replay(ledger: Ledger, folder: Path, links: Sequence[Link], recoding: Recoding) -> Replayed:
    """Encode the recorded payloads of a run again.

    Args:
        ledger: of the run.
        folder: its recorded payloads.
        links: its models.
        recoding: the codecs that take the place of the run's.

    Raises:
        UserError: payloads that do not belong to the ledger, or a codec that needs what was not recorded.
    """
    _require_possible(links, recoding)
    files = recorded_files(folder)
    booked = _booked(ledger, frozenset(number for number, _ in files))
    measured: Sections = defaultdict(int)
    replayed: Sections = defaultdict(int)
    states: dict[int, Params] = {}
    for number, path in files:
        one = _Round(number, links, recoding, path, states)
        for message in read_round(path):
            if message.direction == "down" and links[0].broadcast and message.phase != "query":
                continue  # stays as measured
            rows = booked[number, message.direction, message.phase, message.client]
            if not rows:
                raise UserError(
                    f"{path}: a message that the ledger does not have: {message.direction}, {message.client}"
                )
            row = {section: int(each["payload_bytes"]) for section, each in rows.popleft().items()}
            encoded = one.sections(message)
            rest = {section: size - encoded.before.get(section, 0) for section, size in row.items()}
            besides = (size for section, size in rest.items() if section != "auxiliary" and not is_extra(section))
            if any(besides) or min(rest.values()) < 0:
                raise UserError(f"{path}: the payload of client {message.client} is not the one that was booked")
            _add(measured, message.direction, row)
            _add(replayed, message.direction, encoded.after)
            _add(
                replayed, message.direction, rest
            )  # what names the frozen weights, at the first contact; extra tensors
    for left in (message for messages in booked.values() for message in messages):
        row, direction = {name: int(each["payload_bytes"]) for name, each in left.items()}, left["header"]["direction"]
        _require_recorded(left, links, folder)
        _add(measured, str(direction), row)
        _add(replayed, str(direction), row)
    return Replayed(dict(measured), dict(replayed), tuple(number for number, _ in files))


def _add(table: Sections, direction: str, sections: Mapping[str, int]) -> None:
    for section, size in sections.items():
        table[direction, section] += size


def _require_possible(links: Sequence[Link], recoding: Recoding) -> None:
    for link in links:
        exchange = link.exchange
        if not link.broadcast:
            continue
        if recoding.downlink != exchange.downlink or recoding.mask != OURS:
            raise UserError(
                "wire.broadcast: a sparse broadcast chooses by the sizes what it sends, so its downlink cannot be encoded "
                "again; run it with the other codec"
            )
        if recoding.uplink.content != exchange.uplink.content:
            raise UserError("wire.uplink.content: cannot be replayed where wire.broadcast is set; run it")


def _require_recorded(left: Booked, links: Sequence[Link], folder: Path) -> None:
    """Whether a message without a recorded payload has none that another codec would change."""
    row = left["header"]
    plain = row["status"] in ("ok", "late") and (row["direction"] == "down" or row["phase"] == "train")
    broadcast = row["direction"] == "down" and links[0].broadcast
    if plain and not broadcast:
        raise UserError(
            f"{folder}: the payload of client {row['client']} in round {row['round']} ({row['direction']}, {row['phase']}) "
            "is in the ledger but was not recorded"
        )


# -- from recorded masks -----------------------------------------------------------------------------------------------


def replay_masks(ledger: Ledger, masks: Iterator[RecordedMask], mask: str) -> Replayed:
    """Encode the recorded masks of training messages in another way; everything else as it was measured.

    Raises:
        UserError: unknown codec, or masks that are not those of the ledger's messages; names the rounds.
    """
    coder = find("--mask", mask, MASKS)
    recorded = list(masks)
    _require_same_messages(ledger, recorded)
    measured = {(str(d), str(s)): size for (d, s), size in ledger.total(by=("direction", "section")).items()}
    replayed = dict(measured)
    if mask != OURS:
        queries = ledger.total(by=("direction", "phase", "section"))
        for direction in ("up", "down"):
            others = sum(queries.get((direction, phase, "mask"), 0) for phase in ("evaluate", "query"))
            sizes = (coder(each.bits, 0) for each in recorded if each.direction == direction and each.bits is not None)
            if (direction, "mask") in measured:
                replayed[direction, "mask"] = others + sum(sizes)
    return Replayed(measured, replayed, tuple(sorted(set(ledger.column("round").tolist()))))


def _require_same_messages(ledger: Ledger, recorded: Sequence[RecordedMask]) -> None:
    """Refuse recorded masks that are not one for each training message of the ledger."""
    headers = (message["header"] for message in ledger.by_message(phase="train"))
    moved = Counter((int(row["round"]), str(row["direction"]), int(row["client"])) for row in headers)
    kept = Counter((each.round, each.direction, each.client) for each in recorded)
    for lost, words in ((moved - kept, "are missing"), (kept - moved, "are not of this run's messages")):
        if rounds := sorted({number for number, _, _ in lost}):
            told = ", ".join(map(str, rounds[:10])) + (", ..." if len(rounds) > 10 else "")
            raise UserError(
                f"masks.parquet: recorded masks of round {told} {words}; put the file back, or run it again with --fresh"
            )
