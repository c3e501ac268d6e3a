"""Tasks and updates as messages: one payload per message, and who holds which mask.

A message's content is `{"payload": ArrayRecord({"p": Array}), "config" | "metrics": ...}`. The one `Array` has the type
`fl_sim.update/1` and carries the bytes of `fl_sim.codecs`; nothing else that scales with the model travels. Flower's
records hold the scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.types import FlatMask, FlatParams, Mask, Params, Scalar, Task, Update, UserError

STYPE = "fl_sim.update/1"
PAYLOAD, CONFIG, METRICS = "payload", "config", "metrics"
NUM_EXAMPLES = "num-examples"
ROUND, SEED = "round", "seed"
RESIDUAL = "residual."
"""Prefix of a client's kept error-feedback tensors: what it wanted to send and the server does not know yet."""


@dataclass(frozen=True)
class Content:
    """What the values in a payload mean: `outgoing` before encoding, `incoming` after decoding; `reference` is shared.

    Both take (flat values, flat reference), 1-D float32 in schema order, and return new flat values.
    """

    outgoing: Callable[[Tensor, Tensor], Tensor]
    incoming: Callable[[Tensor, Tensor], Tensor]


def _as_is(values: Tensor, reference: Tensor) -> Tensor:
    return values


CONTENTS: Mapping[str, Content] = {
    # Exact: the receiver gets the sender's parameters bit for bit.
    "parameters": Content(_as_is, _as_is),
    # What lossy value types need: a client's change is small beside its weights. `w0 + (w1 - w0) == w1` holds for about
    # 99.5 % of float32 values, so even float32 differences restore a few coordinates one unit in the last place off.
    "difference": Content(torch.sub, torch.add),
}


@dataclass(frozen=True)
class Coding:
    """How one direction is encoded: the value type (`fl_sim.codecs.VALUES`) and what the values mean (`CONTENTS`)."""

    values: str = "float32"
    content: str = "parameters"

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("values", self.values, codecs.VALUES),
            ("content", self.content, CONTENTS),
        ):
            if value not in allowed:
                raise UserError(f"wire: unknown {what} {value!r}; allowed: {', '.join(allowed)}")

    def encode(
        self, params: Params, mask: Mask | None, reference: Params, *, schema: Schema, held: Mask | None, seed: int
    ) -> bytes:
        """Encode parameters of `schema`, relative to `reference` where this coding says so."""
        values = CONTENTS[self.content].outgoing(schema.flat(params), schema.flat(reference))
        return codecs.encode(schema.view(values), mask, schema=schema, held=held, values=self.values, seed=seed)

    def decode(
        self, data: bytes | memoryview, reference: Params, *, schema: Schema, held: Mask | None
    ) -> tuple[Params, Mask | None]:
        """Invert `encode`. Coordinates outside the returned mask hold no information.

        Raises:
            CorruptPayload: the bytes are no payload of `schema`, or name a mask that is not `held`.
        """
        params, mask = codecs.decode(data, schema=schema, held=held)
        return schema.view(CONTENTS[self.content].incoming(schema.flat(params), schema.flat(reference))), mask


@dataclass(frozen=True)
class Exchange:
    """What a federation exchanges: the schema both ends hold and the coding of each direction."""

    schema: Schema
    uplink: Coding = Coding()
    downlink: Coding = Coding()
    error_feedback: bool = False

    def believed(self, sent: Params, mask: Mask | None, received: Params) -> FlatParams:
        """The client's parameters as the server now knows them: `sent` where it travelled, else what was `received`."""
        flat = self.schema.flat(sent)
        if mask is not None:
            known = flat.clone()
            count = self.schema.prunable_size
            alive = self.schema.flat_mask(mask)
            torch.where(alive, flat[:count], self.schema.flat(received)[:count], out=known[:count])
            flat = known
        return self.schema.view(flat)


@dataclass
class Holdings:
    """Which mask each client holds, as the server knows it. A mask may stay implied only for a client that holds it."""

    _masks: dict[bytes, Mask] = field(default_factory=dict)
    _held: dict[int, bytes] = field(default_factory=dict)

    def held(self, client: int) -> Mask | None:
        """The mask that this client holds, or None when it must be sent."""
        key = self._held.get(client)
        return None if key is None else self._masks[key]

    def learned(self, client: int, mask: Mask | None) -> None:
        """The client answered a task under `mask` (None: a dense task leaves what it holds as it was)."""
        if mask is not None:
            self._held[client] = key = codecs.mask_hash(mask)
            if key not in self._masks:
                self._masks[key] = mask
                used = set(self._held.values())
                self._masks = {k: m for k, m in self._masks.items() if k in used}

    def known(self) -> dict[int, Mask]:
        """Client -> the mask that it holds; clients with equal masks share one."""
        return {client: self._masks[key] for client, key in self._held.items()}

    def forget(self, client: int) -> None:
        """The client failed, so what it kept is unknown: the next task carries its mask whole."""
        self._held.pop(client, None)


def content(
    data: bytes, *, config: Mapping[str, Scalar] | None = None, metrics: Mapping[str, float] | None = None
) -> RecordDict:
    """One message's content around one payload."""
    array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    made = RecordDict({PAYLOAD: ArrayRecord({"p": array})})
    if config is not None:
        made[CONFIG] = ConfigRecord(dict(config))
    if metrics is not None:
        made[METRICS] = MetricRecord(dict(metrics))
    return made


def payload(message: RecordDict) -> bytes | memoryview:
    """The payload's bytes, not copied.

    Raises:
        CorruptPayload: there is not exactly one array of our type.
    """
    records = list(message.array_records.values())
    arrays = list(records[0].values()) if len(records) == 1 else []
    if len(arrays) != 1 or arrays[0].stype != STYPE:
        raise CorruptPayload(f"expected one array of type {STYPE!r}")
    return arrays[0].data


def array_bytes(message: RecordDict) -> int:
    """Bytes of all arrays of a message, whatever they are."""
    return sum(len(array.data) for record in message.array_records.values() for array in record.values())


def task_content(task: Task, data: bytes, *, seed: int) -> RecordDict:
    """The message of a task whose parameters and mask are encoded in `data`."""
    return content(data, config={**task.config, ROUND: task.round, SEED: seed})


def update_content(update: Update, data: bytes) -> RecordDict:
    """The message of an update whose parameters and mask are encoded in `data`."""
    return content(data, metrics={**update.metrics, NUM_EXAMPLES: update.num_examples})


def read_metrics(message: RecordDict) -> tuple[int, dict[str, float]]:
    """(num_examples, metrics) of a reply.

    Raises:
        CorruptPayload: the number of examples is missing or not a positive integer below 2**31, or a metric is no number.
    """
    record = message.metric_records.get(METRICS)
    values = dict(record) if record is not None else {}
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
