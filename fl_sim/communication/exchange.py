"""Exchange of a federation: what travels, and how each direction is encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import ClassVar

import torch
import xxhash
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import Codec, CorruptPayload, Opened, Own, Schema
from fl_sim.communication.extra import NO_SCHEMAS, ExtraSchemas
from fl_sim.core.types import FlatParams, Mask, Params, Task, Update, UserError

FROZEN_STYPE = "fl_sim.frozen/1"


@dataclass(frozen=True)
class Content:
    """Meaning of a payload's values, as two functions that invert each other.

    Both take (flat values, flat reference), 1-D float32 in schema order, and return new flat values. Sender and receiver
    have the same reference.

    Attributes:
        summary: one line for `fl-sim list` and the docs.
        outgoing: applied before encoding; None = the values travel as they are.
        incoming: applied after decoding; None likewise.
    """

    summary: str
    outgoing: Callable[[Tensor, Tensor], Tensor] | None = None
    incoming: Callable[[Tensor, Tensor], Tensor] | None = None


CONTENTS: Mapping[str, Content] = {
    "parameters": Content("The parameters themselves, bit for bit."),
    # What lossy value types need: a client's change is small beside its weights. `w0 + (w1 - w0) == w1` holds for about
    # 99.5 % of float32 values, so even float32 differences restore a few coordinates one unit in the last place off.
    "difference": Content(
        "Their change against what the receiver knows: what lossy value types need.", torch.sub, torch.add
    ),
}


MASK_CODINGS: Mapping[str, bool] = {"fast": False, "smallest": True}
"""How masks are coded -> whether contexts are tried."""


@dataclass(frozen=True)
class Coding:
    """Encoding of one direction: the value type (`fl_sim.codecs.VALUES`), the meaning of the values (`CONTENTS`), masks.

    Attributes:
        values: value type: float32, float32-zstd, float32-delta, float16, float16-delta, bfloat16, bfloat16-delta, int8, int4,
            int2, sign, top25-int8, top10-int8, top10-ternary, top1-ternary.
        content: "parameters", or their "difference" to the model that the receiver holds.
        masks: how masks are coded: "fast", or "smallest", which also tries contexts: for clustered masks of top-k updates, at
            200 to 1,000 MB of model a second.
    """

    values: str = "float32"
    content: str = "parameters"
    masks: str = "fast"

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("values", self.values, codecs.VALUES),
            ("content", self.content, CONTENTS),
            ("masks", self.masks, MASK_CODINGS),
        ):
            if value not in allowed:
                raise UserError(f"wire: unknown {what} {value!r}; allowed: {', '.join(allowed)}")
        if codecs.is_relative(self.values) and self.content != "parameters":
            raise UserError(
                f"wire: {self.values} codes the parameters against the model that the receiver holds; "
                f"content = {self.content!r}: allowed: parameters"
            )

    @property
    def is_exact(self) -> bool:
        """Whether the receiver decodes the sender's parameters bit for bit."""
        return self.values in codecs.LOSSLESS and self.content == "parameters"

    @property
    def is_plain(self) -> bool:
        """Whether every value takes four bytes, whatever it is."""
        return self.values == "float32"

    def encode(
        self,
        params: Params,
        sent_mask: Mask | None,
        reference: Params,
        *,
        schema: Schema,
        held_mask: Mask | None,
        seed: int,
        types: Sequence[str] | None = None,
        state: Params | None = None,
    ) -> bytes:
        """Encode parameters of `schema`, relative to `reference` where this coding says so.

        `types`, a value type for each prunable tensor, takes the place of this coding's one. `state` is what a codec of the
        user's own keeps of this sender, which it changes; the other codings keep nothing.
        """
        if outgoing := CONTENTS[self.content].outgoing:
            params = schema.view(outgoing(schema.flat(params), schema.flat(reference)))
        return self.encoded(
            params,
            sent_mask,
            reference,
            schema=schema,
            held_mask=held_mask,
            seed=seed,
            types=types,
            state={} if state is None else state,
        )

    def encoded(
        self,
        values: Params,
        sent_mask: Mask | None,
        reference: Params,
        *,
        schema: Schema,
        held_mask: Mask | None,
        seed: int,
        state: Params,
        types: Sequence[str] | None = None,
    ) -> bytes:
        """`encode` of values that have this coding's content already."""
        return codecs.encode(
            values,
            sent_mask,
            schema=schema,
            held_mask=held_mask,
            values=types or self.value_type(schema, state),
            seed=seed,
            base=reference,
            contexts=MASK_CODINGS[self.masks],
        )

    def value_type(self, schema: Schema, state: Params) -> str | Own:
        """How the values of a message of `schema` are coded."""
        return self.values

    def decoded(self, payload: Opened, reference: Params) -> tuple[Params, Mask | None]:
        """The values of a payload, in this coding's content.

        Raises:
            CorruptPayload: as `decode`.
        """
        return payload.decoded(reference)

    def decode(
        self, data: bytes | memoryview, reference: Params, *, schema: Schema, held_mask: Mask | None
    ) -> tuple[Params, Mask | None]:
        """Invert `encode`. Coordinates outside the returned mask hold no information.

        Raises:
            CorruptPayload: the bytes are no payload of `schema`, or name a mask that is not `held_mask`.
        """
        return self.restore(codecs.opened(data, schema=schema, held_mask=held_mask), reference)

    def restore(self, payload: Opened, reference: Params) -> tuple[Params, Mask | None]:
        """`decode` of a payload that was opened."""
        params, mask = self.decoded(payload, reference)
        incoming, schema = CONTENTS[self.content].incoming, payload.schema
        if incoming is None:
            return params, mask
        values = incoming(schema.flat(params), schema.flat(reference))
        if not codecs.finite(values):
            raise CorruptPayload("a value overflows once it is added to what it differs from")
        return schema.view(values), mask


@dataclass(frozen=True)
class OwnCoding(Coding):
    """Encoding of one direction by a codec of the user's own (`wire.codec`).

    Attributes:
        codec: the user's object; it serves all senders and receivers of a process.
        name: import path and options, which messages name and which tell two of them apart.
    """

    codec: Codec = field(kw_only=True, compare=False)
    name: str = field(kw_only=True)

    @property
    def is_exact(self) -> bool:
        """Nobody knows: the answer is no."""
        return False

    @property
    def is_plain(self) -> bool:
        """See `Coding`."""
        return False

    def value_type(self, schema: Schema, state: Params) -> Own:
        """See `Coding`."""
        return Own(self.codec, schema.prunable_part, self.name, state)

    def decoded(self, payload: Opened, reference: Params) -> tuple[Params, Mask | None]:
        """See `Coding`."""
        return payload.decoded(reference, self.value_type(payload.schema, {}))


@dataclass(frozen=True)
class Frozen:
    """Weights that do not travel in a round: every party makes them from `seed`, and `digest` proves that they came out the
    same. `base` holds those that come from a file, encoded; a client gets them once."""

    seed: int
    digest: bytes
    base: bytes | memoryview = field(default=b"", compare=False, repr=False)
    FORM: ClassVar[Struct] = Struct("<Q8s")

    @property
    def size(self) -> int:
        """Bytes of a client's first contact: seed, hash and base."""
        return self.FORM.size + len(self.base)

    def encode(self) -> bytes:
        """Sixteen bytes: seed, hash."""
        return self.FORM.pack(self.seed, self.digest)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Frozen:
        """Invert `encode`.

        Raises:
            CorruptPayload: not sixteen bytes.
        """
        if len(data) != cls.FORM.size:
            raise CorruptPayload(f"{FROZEN_STYPE} takes {cls.FORM.size} bytes, not {len(data)}")
        return cls(*cls.FORM.unpack(data))

    @staticmethod
    def digest_of(params: Params) -> bytes:
        """Eight bytes over names, shapes and bits, in each tensor's dtype, whatever the memory layout and device."""
        check = xxhash.xxh3_64()
        for name, value in params.items():
            check.update(f"{name}{tuple(value.shape)}".encode())
            check.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return check.digest()


@dataclass(frozen=True)
class Exchange:
    """Exchange of a federation: the schema that both ends hold, and the coding of each direction.

    Attributes:
        schema: the tensors that travel.
        uplink, downlink: how each direction is encoded.
        error_feedback: whether clients keep what an upload left out (`fl_sim.communication.error_feedback`).
        frozen: what stands for the weights that never travel; None when there are none.
        base: the entries that never travel but come from a file, so that `frozen` carries them; None when there are none.
        personal: names of entries that each client keeps for itself.
        extra: schemas of the extra tensors of both directions.
    """

    schema: Schema
    uplink: Coding = Coding()
    downlink: Coding = Coding()
    error_feedback: bool = False
    frozen: Frozen | None = None
    personal: tuple[str, ...] = ()
    base: Schema | None = None
    extra: ExtraSchemas = NO_SCHEMAS

    def decode_base(self, frozen: Frozen) -> Params:
        """The entries of a file that the first contact carries.

        Raises:
            CorruptPayload: the bytes are no payload of these entries.
        """
        return {} if self.base is None else codecs.decode(frozen.base, schema=self.base)[0]

    def encode_up(self, update: Update, task: Task, *, seed: int, state: Params | None = None) -> bytes:
        """The payload of an update, for a server that sent `task`; `state` as in `Coding.encode`."""
        return self.uplink.encode(
            update.params, update.mask, task.params, schema=self.schema, held_mask=task.mask, seed=seed, state=state
        )

    def encode_up_all(
        self, rows: Tensor, received: Tensor, *, seeds: Sequence[int], masks: Tensor | None = None
    ) -> list[bytes] | None:
        """The payloads of several clients, each as `encode_up` makes it; (clients, values) in schema order, of clients that
        `received` the same and no pruning mask. `masks` are upload masks, bool (clients, prunable values); None sends all.

        None where each is to be encoded by itself."""
        contexts = masks is not None and MASK_CODINGS[self.uplink.masks]
        if type(self.uplink) is not Coding or not self.schema.is_flat or contexts:
            return None
        outgoing = CONTENTS[self.uplink.content].outgoing
        values = rows if outgoing is None else outgoing(rows, received)
        base, coding = self.schema.view(received), self.uplink.values
        return codecs.encode_all(values, schema=self.schema, values=coding, seeds=seeds, masks=masks, base=base)

    def decode_up(self, data: bytes | memoryview, task: Task) -> tuple[Params, Mask | None]:
        """Invert `encode_up`; raises as `Coding.decode` does."""
        return self.uplink.decode(data, task.params, schema=self.schema, held_mask=task.mask)

    def decode_up_all(self, data: Sequence[bytes], start: Params) -> Tensor | None:
        """The values that `decode_up` makes of several clients' payloads, (clients, values) in schema order; they started from the
        same parameters, without a pruning mask. None where one is refused."""
        try:
            payloads = [codecs.opened(each, schema=self.schema) for each in data]
            found = zip(self.restore_up_all(payloads, start), payloads, strict=True)
            restored = [each or self.uplink.restore(payload, start) for each, payload in found]
        except CorruptPayload:
            return None
        return torch.stack([self.schema.flat(params) for params, _ in restored])

    def restore_up_all(self, payloads: Sequence[Opened], start: Params) -> list[tuple[Params, Mask | None] | None]:
        """What `uplink.restore` makes of each of several clients' payloads; they started from the same parameters.

        None for those that are to be restored by themselves, which also says what is wrong with one."""
        found: list[tuple[Params, Mask | None] | None] = [None] * len(payloads)
        for places in codecs.alike(payloads) if type(self.uplink) is Coding else ():
            if len(places) > 1 and (made := self._restored([payloads[place] for place in places], start)):
                for place, each in zip(places, made, strict=True):
                    found[place] = each
        return found

    def _restored(self, payloads: Sequence[Opened], start: Params) -> list[tuple[Params, Mask | None]] | None:
        stack = codecs.decode_all(payloads, start)
        if stack is None:
            return None
        rows, incoming = stack.rows, CONTENTS[self.uplink.content].incoming
        if incoming is not None:
            rows = incoming(rows, self.schema.flat(start))
            if not codecs.finite(rows.reshape(-1)):
                return None
        masks = [None] * len(rows) if stack.masks is None else map(self.schema.view_mask, stack.masks.unbind())
        return list(zip(map(self.schema.view, rows.unbind()), masks, strict=True))

    def encode_down(
        self,
        task: Task,
        reference: Params,
        *,
        held_mask: Mask | None,
        seed: int,
        types: Sequence[str] | None = None,
        state: Params | None = None,
    ) -> bytes:
        """The payload of a task, for a client that holds the pruning mask `held_mask`; the rest as in `Coding.encode`."""
        return self.downlink.encode(
            task.params,
            task.mask,
            reference,
            schema=self.schema,
            held_mask=held_mask,
            seed=seed,
            types=types,
            state=state,
        )

    def decode_down(
        self, data: bytes | memoryview, reference: Params, *, held_mask: Mask | None
    ) -> tuple[Params, Mask | None]:
        """Invert `encode_down`; raises as `Coding.decode` does."""
        return self.downlink.decode(data, reference, schema=self.schema, held_mask=held_mask)

    def encode_extra_up(self, update: Update, task: Task, *, seed: int) -> dict[str, bytes]:
        """The payloads of an update's extra tensors; raises as `ExtraSchemas.encode` does."""
        return self.extra.encode(self.extra.up, update.extra, task.mask, values=self.uplink.values, seed=seed)

    def encode_extra_down(self, task: Task, *, seed: int) -> dict[str, bytes]:
        """The payloads of a task's extra tensors; raises as `ExtraSchemas.encode` does."""
        return self.extra.encode(self.extra.down, task.extra, task.mask, values=self.downlink.values, seed=seed)

    def reconstructed(self, sent: Params, upload_mask: Mask | None, received: Params) -> FlatParams:
        """The client's parameters as the server now knows them: `sent` where it travelled, else what was `received`."""
        flat = self.schema.flat(sent)
        if upload_mask is not None:
            known = flat.clone()
            count = self.schema.prunable_size
            alive = self.schema.flat_mask(upload_mask)
            torch.where(alive, flat[:count], self.schema.flat(received)[:count], out=known[:count])
            flat = known
        return self.schema.view(flat)
