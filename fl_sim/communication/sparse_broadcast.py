"""A sparse downlink: clients are sent what changed against the model that they hold.

The server *publishes* a model of its own making: the last published one plus the largest changes of the global model,
in the value type of the downlink. What that leaves out stays in the difference between the two and is offered again
(error feedback at the server; Tang et al., 2019, DoubleSqueeze, algorithm 1; Sattler et al., 2019, section 5). Every
client trains on the published model, whichever one it held before, bit for bit (`strategies.published_model` keeps the books):

    held the last one        the last change, sparse, in its value type
    held an older one        the changes since, one after another
    was never told any       the same, from the seeded model, which it makes itself; a hash proves that it came out equal
    failed, or so long ago   the whole model as float32
      that this is smaller

A new pruning mask is a change of all that it leaves alive, and brings the mask. What is not prunable travels whole, once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Description, Schema
from fl_sim.communication.messages import Coding, Exchange
from fl_sim.core.types import Mask, Scalar, UserError

WHOLE, REST = Coding("float32", "parameters"), Coding("float32-zstd", "parameters")
VERSION, BASE, CONTENT, MASKS, START = "model-version", "base-version", "content", "mask-changes", "start-hash"
RESERVED = (VERSION, BASE, CONTENT, MASKS, START)
"""Keys of a task's config that say how to read its payload."""
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class SparseBroadcast:
    """Sparse broadcast: the server sends only changes against the model that a client holds.

    Attributes:
        density: share of the prunable weights whose change is sent in a round, above 0 and at most 1; the largest changes
            over all layers.
        values: value type of the changes, as in `[wire.uplink]`.
    """

    density: float = 0.1
    values: str = "float32"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UserError(f"wire.broadcast.density = {self.density}: must be above 0 and at most 1")
        Coding(self.values, "difference")

    @property
    def coding(self) -> Coding:
        """Of the published changes."""
        return Coding(self.values, "difference")


@dataclass(frozen=True)
class Step:
    """A delta: one published change of the prunable parameters.

    Attributes:
        data: the payload; its mask says which coordinates change.
        masks: whether that mask is also the new pruning mask.
    """

    data: bytes | memoryview
    masks: bool = False

    def apply(self, model: Tensor, coding: Coding, exchange: Exchange) -> tuple[Tensor, Mask | None]:
        """(the next model, flat, with the rest as it was; the coordinates that changed, None = all).

        Raises:
            CorruptPayload: the bytes are no payload of the prunable part.
        """
        schema, count = exchange.schema.prunable_part, exchange.schema.prunable_size
        old = model[:count]
        sent, chosen = coding.decode(self.data, schema.view(old), schema=schema, held=None)
        following = model.clone()
        if chosen is None:
            following[:count] = schema.flat(sent)
        else:
            kept = torch.zeros(()) if self.masks else old
            torch.where(schema.flat_mask(chosen), schema.flat(sent), kept, out=following[:count])
        return following, chosen


def join_framed(payloads: Sequence[bytes | memoryview]) -> bytes:
    """Several payloads as one: each after its length."""
    return b"".join(part for data in payloads for part in (LENGTH.pack(len(data)), data))


def split_framed(data: bytes | memoryview) -> list[memoryview]:
    """Invert `join_framed`.

    Raises:
        CorruptPayload: a length does not fit.
    """
    view, at, payloads = memoryview(data), 0, []
    while at < len(view):
        end = at + LENGTH.size
        size = LENGTH.unpack_from(view, at)[0] if end <= len(view) else len(view)
        if end + size > len(view):
            raise CorruptPayload("a change's length does not fit")
        payloads.append(view[end : end + size])
        at = end + size
    return payloads


@dataclass(frozen=True)
class Parcel:
    """A payload of a sparse broadcast, with the header that a client needs to read it.

    Attributes:
        data: the payload; changes and the rest `join_framed` where there is a base.
        version: the published model that it leads to; negative = none, the global model itself.
        base: the version that it starts from; None = it is whole.
        coding: of the payload, or of the changes in it.
        mask: the coordinates that travel; None = all.
        masks: for each change, 1 if it brings a pruning mask.
        start: hash of the seeded model, for who starts from it.
    """

    data: bytes | memoryview
    version: int
    base: int | None
    coding: Coding
    mask: Mask | None = None
    masks: bytes = b""
    start: bytes = b""

    @property
    def told(self) -> dict[str, Scalar]:
        """Header: scalars that travel beside the payload."""
        base = -1 if self.base is None else self.base
        return {
            VERSION: self.version,
            BASE: base,
            CONTENT: self.coding.content,
            MASKS: self.masks,
            START: self.start,
        }

    def described(self, schema: Schema, held: Mask | None) -> Description:
        """Describe the payload's sections for a receiver that holds this pruning mask."""
        if self.base is None:
            return codecs.describe(self.data, schema=schema, held=held)
        *steps, rest = split_framed(self.data)
        parts = [codecs.describe(data, schema=schema.prunable_part) for data in steps]
        parts.append(codecs.describe(rest, schema=schema.other_part))
        return Description.of_several(parts, framing=len(parts) * LENGTH.size)

    @classmethod
    def arrived(cls, data: bytes | memoryview, config: dict[str, object]) -> Parcel | None:
        """The parcel of a message, whose entries leave `config`; None where the payload is of no published model.

        Raises:
            UserError: the message does not say what such messages say.
        """
        if VERSION not in config:
            return None
        version, base, content, masks, start = (config.pop(k, None) for k in (VERSION, BASE, CONTENT, MASKS, START))
        match version, base, content, masks, start:
            case int(), int(), str(), bytes(), bytes():
                coding = Coding(content=content)
                return cls(data, version, None if base < 0 else base, coding, None, masks, start)
        raise UserError(f"a published model's version, base and content are {version!r}, {base!r}, {content!r}")


def digest(model: Tensor, exchange: Exchange) -> bytes:
    """Eight bytes over the bits of a flat model's prunable part."""
    return xxhash.xxh3_64_digest(model[: exchange.schema.prunable_size].numpy().tobytes())


def received(
    parcel: Parcel, before: Tensor | None, exchange: Exchange, held: Mask | None
) -> tuple[Tensor, Mask | None]:
    """The client's side: the published model, flat, and the pruning mask that it is under.

    Args:
        parcel: as it arrived; its `mask` is not used.
        before: the model of `parcel.base`, flat, that this client holds or, for the seeded one, made.
        exchange: what the federation exchanges.
        held: the pruning mask that this client holds.

    Raises:
        CorruptPayload: the bytes are no payload of this schema.
        ValueError: the client does not hold the base, or made another seeded model than the server.
    """
    schema = exchange.schema
    if parcel.base is None:
        params, mask = codecs.decode(parcel.data, schema=schema, held=held)
        return schema.flat(params).clone(), mask
    if before is None:
        raise ValueError(f"the payload changes model {parcel.base}, which this client does not hold")
    if parcel.start and parcel.start != digest(before, exchange):
        raise ValueError("the seeded model made here is not the server's: model, initialisation or versions differ")
    parts = split_framed(parcel.data)
    if len(parts) != len(parcel.masks) + 1:
        raise CorruptPayload(f"{len(parts)} parts where {len(parcel.masks)} changes and the rest are due")
    model = before
    for data, masks in zip(parts, parcel.masks, strict=False):
        model, chosen = Step(data, bool(masks)).apply(model, parcel.coding, exchange)
        held = chosen if masks else held
    rest, _ = codecs.decode(parts[-1], schema=schema.other_part)
    return torch.cat([model[: schema.prunable_size], schema.other_part.flat(rest)]), held
