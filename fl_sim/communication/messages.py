"""Tasks and updates as messages: one payload per message.

A task's content is `{"payload": ArrayRecord({"p": Array}), "header": ConfigRecord, "config": ConfigRecord}`, a reply's
`{"payload": ..., "metrics": MetricRecord}`. The one `Array` has the type `fl_sim.update/1` and carries the bytes of
`fl_sim.codecs`. Extra tensors are further arrays, `extra/<name>` of the type `fl_sim.extra/1`; nothing else that scales with
the model travels. A client's first task also names what never travels (`Frozen`, 16 bytes, type `fl_sim.frozen/1`). The
header holds the protocol's scalars (`TaskHeader`), the config the user's; a task without any has no config record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.codecs.sections import extra_section, is_extra
from fl_sim.communication.exchange import FROZEN_STYPE, Frozen
from fl_sim.communication.flower_private import array_of, filled, is_arrays
from fl_sim.communication.task_header import BroadcastHeader, Request, TaskHeader
from fl_sim.core.types import FlatMask, Mask, Scalar, Task, Update

STYPE, BASE_STYPE = "fl_sim.update/1", "fl_sim.base/1"
EXTRA_STYPE = "fl_sim.extra/1"
PAYLOAD, HEADER, CONFIG, METRICS = "payload", "header", "config", "metrics"
NUM_EXAMPLES = "num-examples"
PARTITION = "partition-id"
"""Key of a node's configuration: which partition of the data it holds."""


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
    return [(key, record) for key, record in message.items() if is_arrays(record)]


def array_bytes(message: RecordDict) -> int:
    """Bytes of all arrays of a message, whatever they are."""
    return sum(len(array.data) for _, record in array_records(message) for array in record.values())


def task_content(
    task: Task,
    data: bytes,
    *,
    frozen: Frozen | None = None,
    broadcast: BroadcastHeader | None = None,
    request: Request | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> RecordDict:
    """Build the message of a task whose parameters and mask are encoded in `data`, its extra tensors in `extra`."""
    header = TaskHeader(task.round, task.seed, broadcast, request)
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
    values = dict(record.items()) if isinstance(record, MetricRecord) else {}
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
