"""A sparse downlink: clients are sent what changed against the model that they hold.

The server *publishes* a model of its own making: the last published one plus the largest changes of the global model,
in the value type of the downlink. What that leaves out stays in the difference between the two and is offered again
(error feedback at the server; Tang et al., 2019, DoubleSqueeze, algorithm 1; Sattler et al., 2019, section 5). Every
client trains on the published model, whichever one it held before, bit for bit; `strategies.published_model` keeps the
version of each client:

    held version             what is sent
    the last one             the last delta, sparse, in its value type
    an older one             the deltas since then, one after another
    none yet (version 0)     the same, from the seeded model; a hash proves that client and server built the same one
    unknown, or so old that  the whole model as float32
      this is smaller

A new pruning mask is a change of all that it leaves alive, and brings the mask. What is not prunable travels whole, once.
A codec of the user's own on the downlink codes the whole change; what it loses is offered again likewise.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import xxhash
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Description, Schema
from fl_sim.communication.exchange import Coding, Exchange, OwnCoding
from fl_sim.communication.task_header import BroadcastHeader
from fl_sim.core.types import Mask, UserError

WHOLE, REST = Coding("float32", "parameters"), Coding("float32-zstd", "parameters")
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class SparseBroadcast:
    """Sparse broadcast: the server sends only changes against the model that a client holds.

    Attributes:
        density: share of the prunable weights whose change is sent in a round, above 0 and at most 1; the largest changes
            over all layers.
        values: value type of the changes, as in `[wire.uplink]`.
        masks: how it is coded which weights change, as in `[wire.uplink]`.
    """

    density: float = 0.1
    values: str = "float32"
    masks: str = "fast"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UserError(f"wire.broadcast.density = {self.density}: must be above 0 and at most 1")
        Coding(self.values, masks=self.masks)

    @property
    def coding(self) -> Coding:
        """Of the published changes; types that code against the held model do so without a difference."""
        return Coding(self.values, "parameters" if codecs.is_relative(self.values) else "difference", self.masks)


def of_changes(exchange: Exchange, plain: Coding) -> Coding:
    """How changes are coded: by the downlink's codec of the user's own where there is one, else by `plain`."""
    own = exchange.downlink
    return replace(own, content=plain.content) if isinstance(own, OwnCoding) else plain


@dataclass(frozen=True)
class Delta:
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
        sent, chosen = coding.decode(self.data, schema.view(old), schema=schema, held_mask=None)
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
class EncodedModel:
    """Encoded model, as it is sent to every client that holds the same things.

    Attributes:
        data: the payload; deltas and the rest `join_framed` where the header names a base.
        sent_mask: the prunable coordinates that travel; None = all.
        header: how to read the payload of a sparse broadcast; None = the payload is the whole global model.
    """

    data: bytes | memoryview
    sent_mask: Mask | None = None
    header: BroadcastHeader | None = None

    def described(self, schema: Schema, held_mask: Mask | None) -> Description:
        """Describe the payload's sections for a receiver that holds this pruning mask."""
        if self.header is None or self.header.base is None:
            return codecs.describe(self.data, schema=schema, held_mask=held_mask)
        *deltas, rest = split_framed(self.data)
        described = [codecs.describe(data, schema=schema.prunable_part) for data in deltas]
        described.append(codecs.describe(rest, schema=schema.other_part))
        return Description.of_several(described, framing=len(described) * LENGTH.size)


def digest(model: Tensor, exchange: Exchange) -> bytes:
    """Eight bytes over the bits of a flat model's prunable part."""
    return xxhash.xxh3_64_digest(model[: exchange.schema.prunable_size].numpy().tobytes())


def received(
    data: bytes | memoryview, header: BroadcastHeader, before: Tensor | None, exchange: Exchange, held_mask: Mask | None
) -> tuple[Tensor, Mask | None]:
    """Decode a sparse broadcast at the client: (the published model, flat; the pruning mask that it is under).

    Args:
        data: the payload.
        header: how to read the payload.
        before: the model of `header.base`, flat, that this client holds or, for the seeded model, made.
        exchange: what the federation exchanges.
        held_mask: the pruning mask that this client holds.

    Raises:
        CorruptPayload: the bytes are no payload of this schema.
        UserError: the header names a content that is not known here.
        ValueError: the client does not hold the base, or made another seeded model than the server.
    """
    schema = exchange.schema
    if header.base is None:
        params, mask = codecs.decode(data, schema=schema, held_mask=held_mask)
        return schema.flat(params).clone(), mask
    if before is None:
        raise ValueError(f"the payload changes model {header.base}, which this client does not hold")
    if header.start and header.start != digest(before, exchange):
        raise ValueError("the seeded model made here is not the server's: model, initialisation or versions differ")
    *deltas, rest = split_framed(data) or [memoryview(b"")]
    if len(deltas) != len(header.masks):
        raise CorruptPayload(f"{len(deltas)} deltas where {len(header.masks)} are due")
    coding, model = of_changes(exchange, Coding(content=header.content)), before
    for delta, masks in zip(deltas, header.masks, strict=True):
        model, chosen = Delta(delta, bool(masks)).apply(model, coding, exchange)
        held_mask = chosen if masks else held_mask
    others, _ = codecs.decode(rest, schema=schema.other_part)
    return torch.cat([model[: schema.prunable_size], schema.other_part.flat(others)]), held_mask
