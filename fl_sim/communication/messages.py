"""Tasks and updates as messages: one payload per message.

A task's content is `{"payload": ArrayRecord({"p": Array}), "header": ConfigRecord, "config": ConfigRecord}`, a reply's
`{"payload": ..., "metrics": MetricRecord}`. The one `Array` has the type `fl_sim.update/1` and carries the bytes of
`fl_sim.codecs`. Extra tensors are further arrays, `extra/<name>` of the type `fl_sim.extra/1`; nothing else that scales with
the model travels. A client's first task also names what never travels (`Frozen`, 16 bytes, type `fl_sim.frozen/1`). The
header holds the protocol's scalars (`TaskHeader`), the config the user's; a task without any has no config record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from struct import Struct
from typing import ClassVar

import torch
import xxhash
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Opened, Schema
from fl_sim.codecs.sections import extra_section, is_extra
from fl_sim.communication.extra import NO_SCHEMAS, ExtraSchemas
from fl_sim.communication.flower_private import array_of, filled
from fl_sim.communication.task_header import BroadcastHeader, CurveRequest, TaskHeader
from fl_sim.core.types import FlatMask, FlatParams, Mask, Params, Scalar, Task, Update, UserError

STYPE, FROZEN_STYPE, BASE_STYPE = "fl_sim.update/1", "fl_sim.frozen/1", "fl_sim.base/1"
EXTRA_STYPE = "fl_sim.extra/1"
PAYLOAD, HEADER, CONFIG, METRICS = "payload", "header", "config", "metrics"
NUM_EXAMPLES = "num-examples"
PARTITION = "partition-id"
"""Key of a node's configuration: which partition of the data it holds."""


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
            some 200 MB of model a second.
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
    ) -> bytes:
        """Encode parameters of `schema`, relative to `reference` where this coding says so.

        `types`, a value type for each prunable tensor, takes the place of this coding's one.
        """
        if outgoing := CONTENTS[self.content].outgoing:
            params = schema.view(outgoing(schema.flat(params), schema.flat(reference)))
        return codecs.encode(
            params,
            sent_mask,
            schema=schema,
            held_mask=held_mask,
            values=types or self.values,
            seed=seed,
            base=reference,
            contexts=MASK_CODINGS[self.masks],
        )

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
        params, mask = payload.decoded(reference)
        incoming, schema = CONTENTS[self.content].incoming, payload.schema
        if incoming is None:
            return params, mask
        values = incoming(schema.flat(params), schema.flat(reference))
        if not codecs.finite(values):
            raise CorruptPayload("a value overflows once it is added to what it differs from")
        return schema.view(values), mask


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
            check.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
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

    def encode_up(self, update: Update, task: Task, *, seed: int) -> bytes:
        """The payload of an update, for a server that sent `task`."""
        return self.uplink.encode(
            update.params, update.mask, task.params, schema=self.schema, held_mask=task.mask, seed=seed
        )

    def decode_up(self, data: bytes | memoryview, task: Task) -> tuple[Params, Mask | None]:
        """Invert `encode_up`; raises as `Coding.decode` does."""
        return self.uplink.decode(data, task.params, schema=self.schema, held_mask=task.mask)

    def encode_down(
        self, task: Task, reference: Params, *, held_mask: Mask | None, seed: int, types: Sequence[str] | None = None
    ) -> bytes:
        """The payload of a task, for a client that holds the pruning mask `held_mask`; `types` as in `Coding.encode`."""
        return self.downlink.encode(
            task.params, task.mask, reference, schema=self.schema, held_mask=held_mask, seed=seed, types=types
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


def content(
    data: bytes,
    *,
    frozen: Frozen | None = None,
    header: TaskHeader | None = None,
    config: Mapping[str, Scalar] | None = None,
    metrics: Mapping[str, float] | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> RecordDict:
    """Build a message's content around one payload; `metrics` are numbers, which nobody checks after this."""
    arrays: dict[str, object] = {"p": array_of(data, STYPE)}
    for name, encoded in extra.items() if extra else ():
        arrays[extra_section(name)] = array_of(encoded, EXTRA_STYPE)
    if frozen is not None:
        arrays["frozen"] = array_of(frozen.encode(), FROZEN_STYPE)
        if frozen.base:
            arrays["base"] = array_of(bytes(frozen.base), BASE_STYPE)
    records: dict[str, object] = {PAYLOAD: filled(ArrayRecord, arrays)}
    if header is not None:
        records[HEADER] = ConfigRecord(dict(header.scalars()))
    if config:
        records[CONFIG] = ConfigRecord(dict(config))
    if metrics is not None:
        records[METRICS] = filled(MetricRecord, dict(metrics))
    return filled(RecordDict, records)


def payload(message: RecordDict) -> bytes | memoryview:
    """The payload's bytes, not copied.

    Raises:
        CorruptPayload: there is not exactly one array of our type.
    """
    found = _arrays(message, STYPE)
    if len(found) != 1:
        raise CorruptPayload(f"expected one array of type {STYPE!r}")
    return found[0]


def frozen(message: RecordDict) -> Frozen | None:
    """Read a task's word on frozen weights; None where it has none.

    Raises:
        CorruptPayload: it says more than one thing, or the bytes are no `Frozen`.
    """
    found, base = _arrays(message, FROZEN_STYPE), _arrays(message, BASE_STYPE)
    if len(found) > 1 or len(base) > 1:
        raise CorruptPayload(f"expected at most one array of type {FROZEN_STYPE!r}, and one of {BASE_STYPE!r}")
    return replace(Frozen.decode(found[0]), base=base[0] if base else b"") if found else None


def extra_payloads(message: RecordDict) -> dict[str, bytes | memoryview]:
    """Read the payloads of a message's extra tensors by name, not copied.

    Raises:
        CorruptPayload: a name that stands twice, or is no name of extra tensors.
    """
    found: dict[str, bytes | memoryview] = {}
    for _, record in array_records(message):
        for key, array in record.items():
            if array.stype == EXTRA_STYPE:
                name = key.partition("/")[2]
                if not is_extra(key) or name in found:
                    raise CorruptPayload(f"extra tensors {key[:40]!r}: not a name, or there twice")
                found[name] = array.data
    return found


def _arrays(message: RecordDict, stype: str) -> list[bytes | memoryview]:
    return [array.data for _, record in array_records(message) for array in record.values() if array.stype == stype]


def array_records(message: RecordDict) -> list[tuple[str, ArrayRecord]]:
    """A content's records of arrays with their keys; `message.array_records` builds and checks a new mapping each time."""
    return [(key, record) for key, record in message.items() if isinstance(record, ArrayRecord)]


def array_bytes(message: RecordDict) -> int:
    """Bytes of all arrays of a message, whatever they are."""
    return sum(len(array.data) for _, record in array_records(message) for array in record.values())


def task_content(
    task: Task,
    data: bytes,
    *,
    frozen: Frozen | None = None,
    broadcast: BroadcastHeader | None = None,
    curves: CurveRequest | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> RecordDict:
    """Build the message of a task whose parameters and mask are encoded in `data`, its extra tensors in `extra`."""
    header = TaskHeader(task.round, task.seed, broadcast, curves)
    return content(data, frozen=frozen, header=header, config=task.config, extra=extra)


def read_header(message: RecordDict) -> TaskHeader:
    """Read the header of a task.

    Raises:
        CorruptPayload: there is none, or it is not one that this version writes.
    """
    record = message.get(HEADER)
    if not isinstance(record, ConfigRecord):
        raise CorruptPayload(f"a task needs a config record {HEADER!r}")
    return TaskHeader.read(record)


def read_config(message: RecordDict) -> dict[str, Scalar]:
    """Read the user's scalars of a task; empty where the message has none.

    Raises:
        CorruptPayload: a value is no scalar.
    """
    record = message.get(CONFIG)
    found: dict[str, Scalar] = {}
    for key, value in record.items() if isinstance(record, ConfigRecord) else ():
        if isinstance(value, list):
            raise CorruptPayload(f"task.config[{key!r}] is a list; it takes numbers, texts and bytes")
        found[key] = value
    return found


def update_content(update: Update, data: bytes, extra: Mapping[str, bytes] | None = None) -> RecordDict:
    """The message of an update whose parameters and mask are encoded in `data`, its extra tensors in `extra`."""
    return content(data, metrics={**update.metrics, NUM_EXAMPLES: update.num_examples}, extra=extra)


def read_metrics(message: RecordDict) -> tuple[int, dict[str, float]]:
    """(num_examples, metrics) of a reply.

    Raises:
        CorruptPayload: the number of examples is missing or not a positive integer below 2**31, or a metric is no number.
    """
    record = message.get(METRICS)
    values = dict(record) if isinstance(record, MetricRecord) else {}
    count = values.pop(NUM_EXAMPLES, None)
    if not isinstance(count, int) or not 0 < count < 2**31:
        raise CorruptPayload(f"{NUM_EXAMPLES} must be a positive integer, not {count!r}")
    return count, {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}


def pack_mask(mask: Mask) -> Tensor:
    """A mask as packed bits, uint8 1-D, for a client's state."""
    import numpy as np

    flat = mask.flat if isinstance(mask, FlatMask) else FlatMask.pack(mask).flat
    return torch.from_numpy(np.packbits(flat.numpy()))


def unpack_mask(bits: Tensor, schema: Schema) -> FlatMask:
    """Invert `pack_mask` for the prunable names of `schema`."""
    import numpy as np

    flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=schema.prunable_size).astype(bool))
    return schema.view_mask(flat)
