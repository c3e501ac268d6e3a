"""Decoding of what a client receives: once for all clients of a process, as those of a round mostly receive the same bytes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from torch import Tensor

from fl_sim.communication import messages as wire
from fl_sim.communication.exchange import Exchange, Frozen
from fl_sim.communication.sparse_broadcast import received
from fl_sim.communication.task_header import BroadcastHeader
from fl_sim.core.large import is_large
from fl_sim.core.types import Params, Task
from fl_sim.runtime.client.fixed_weights import Resident
from fl_sim.runtime.client.isolation import Received
from fl_sim.runtime.client.node_state import FROZEN, MASK, MODEL, VERSION, keep, kept_tensors


@dataclass(frozen=True)
class _Decoded:
    """The last payload that a process decoded: for which held mask, into what, and what its clients keep of it."""

    data: bytes | memoryview
    key: bytes
    received: Received
    kept: ArrayRecord | None = None


@dataclass
class Receiver:
    """Reads the tasks of a process's clients; the last decoded model stays here.

    Attributes:
        exchange: what travels and how.
        reference: the first global parameters; differences start from them.
        resident: the entries of the process's model that do not travel.
    """

    exchange: Exchange
    reference: Params
    resident: Resident
    _last: _Decoded | None = field(default=None, repr=False)
    _message: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.is_large = is_large(self.exchange.schema.nbytes)

    @property
    def last(self) -> Received:
        """What was decoded last."""
        assert self._last is not None
        return self._last.received

    def forget(self) -> None:
        """Decode the next task anew, even if it has the same bytes."""
        self._last = None

    def receive(self, message: Message, context: Context) -> Task:
        """Decode a task; the bytes of one round are decoded once per process, not once per client."""
        if self.exchange.frozen is not None:
            self._receive_frozen(message, context)
        header = wire.read_header(message.content)
        data, config = wire.payload(message.content), wire.read_config(message.content)
        received = self._model(data, header.broadcast, context)
        if self.is_large:  # what was decoded lies in the message: it is not kept longer than the server keeps that
            self._message = weakref.ref(wire.array_records(message.content)[0][1], self._forget)
        if received.mask is not None:
            keep(context, MASK, {MASK: wire.pack_mask(received.mask)})
        extra = self._extra(message, received) if message.metadata.message_type == MessageType.TRAIN else {}
        return Task(header.round, received.params, received.mask, config, header.seed, extra)

    def _forget(self, gone: object) -> None:
        """Forget what was decoded; called when its message is gone."""
        if gone is self._message:
            self._last = None

    def _extra(self, message: Message, received: Received) -> dict[str, Params]:
        """The extra tensors of a training task, this client's own copies."""
        extra = self.exchange.extra
        return extra.decode(extra.down, wire.extra_payloads(message.content), received.mask)

    def _receive_frozen(self, message: Message, context: Context) -> None:
        """Put the frozen weights in place that the message names, or that this client was told of earlier."""
        known_bytes = kept_tensors(context, FROZEN).get(FROZEN)
        known = None if known_bytes is None else Frozen.decode(known_bytes.numpy().tobytes())
        frozen = self.resident.receive(wire.frozen(message.content), known)
        if frozen != known:
            keep(context, FROZEN, {FROZEN: torch.frombuffer(bytearray(frozen.encode()), dtype=torch.uint8)})

    def _model(self, data: bytes | memoryview, header: BroadcastHeader | None, context: Context) -> Received:
        """The parameters and the pruning mask that a payload stands for; a published model is kept by the client."""
        schema = self.exchange.schema
        packed = kept_tensors(context, MASK).get(MASK)
        key = b"" if packed is None else packed.numpy().tobytes()
        if self._last is None or self._last.data is not data or self._last.key != key:
            self._last = None  # its model is freed before the next one is decoded
            # Of a large model there is no copy to give: the server compares its broadcast's checksum after the round. What lies
            # in memory of other processes is copied: clients of theirs read it too, or later rounds lie there.
            copied = isinstance(data, memoryview) or (self.resident.isolation.needed and not self.is_large)
            held_mask = None if packed is None else wire.unpack_mask(packed, schema)
            if header is None:
                decoded = self.exchange.decode_down(data, self.reference, held_mask=held_mask)
                self._last = _Decoded(data, key, Received.of(*decoded, copied=copied))
            else:
                model, mask = received(data, header, self._base(context, header), self.exchange, held_mask)
                kept = ArrayRecord({MODEL: Array(model.numpy()), VERSION: Array(np.array([header.version]))})
                self._last = _Decoded(data, key, Received.of(schema.view(model), mask, copied=copied), kept)
        last = self._last
        if last.kept is not None:
            # One record for all clients of this process that hold this model: it is replaced, never changed.
            context.state[MODEL] = last.kept
        return last.received

    def _base(self, context: Context, header: BroadcastHeader) -> Tensor | None:
        """The published model, flat, that a payload starts from: as this client holds it, or the seeded one; else None."""
        record = context.state.array_records.get(MODEL)
        if record is None:
            return self.exchange.schema.flat(self.reference) if header.start else None
        return torch.from_numpy(record[MODEL].numpy()) if int(record[VERSION].numpy()[0]) == header.base else None
