"""The names of Flower that are not public, all in one place, with a contract test (`tests/test_flower.py`).

Flower's public API is `flwr.app`, `flwr.serverapp` and `flwr.clientapp`. Running a Grid of our own needs a little more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache, wraps
from typing import Any, TypeGuard, TypeVar, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, MESSAGE_TTL_TOLERANCE
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    Reconnect,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import Strategy
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CHUNK_BYTES",
    "CLIENT_ANSWERED_NONSENSE",
    "CLIENT_APP_CRASHED",
    "CLIENT_APP_OVERDUE",
    "CLIENT_APP_RAISED",
    "EARLIEST",
    "MESSAGE_UNAVAILABLE",
    "RUN_ID",
    "SERVER_NODE",
    "TTL_TOLERANCE_S",
    "Metadata",
    "NodeInfo",
    "Run",
    "adopt_identity",
    "array_of",
    "chunk_bytes",
    "copied",
    "envelope",
    "filled",
    "identified",
    "inbound_bytes",
    "is_arrays",
    "mark_sent",
    "outbound_bytes",
    "record_bytes",
    "record_kind",
    "renewed",
    "reply_to",
    "reply_unavailable",
    "results_recorded",
    "set_message_id",
    "simulate",
    "twin",
    "unavailable",
    "with_chunks",
]

CHUNK_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
"""Flower cuts an array's data into objects of at most this many bytes."""

CLIENT_APP_RAISED = 2
"""`flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION`."""
MESSAGE_UNAVAILABLE = 3
"""`flwr.common.constant.ErrorCode.MESSAGE_UNAVAILABLE`: the message has expired, was pulled before, or never existed."""
CLIENT_APP_OVERDUE = 4
"""`flwr.common.constant.ErrorCode.REPLY_MESSAGE_UNAVAILABLE`: no reply in time."""
CLIENT_ANSWERED_NONSENSE = 100
"""Ours, no code of Flower's: the client function returned something that is no update."""
CLIENT_APP_CRASHED = 0
"""`flwr.common.constant.ErrorCode.UNKNOWN`: Flower's code for a client whose process is gone."""
TTL_TOLERANCE_S = MESSAGE_TTL_TOLERANCE
"""Seconds by which a reply may outlive the message that it answers."""
EARLIEST = 1740700800.0
"""Unix time of 28 February 2025: Flower takes no message that was made before it (`flwr.server.utils.validator`)."""
SERVER_NODE = 1
"""`flwr.common.constant.SUPERLINK_NODE_ID`: the node that a ServerApp's messages come from."""


RUN_ID = 1
"""Run id of the messages of an engine: one byte, as small as an id can be."""


def adopt_identity(run_id: int = RUN_ID) -> None:
    """Give this process the identity that `Message(...)` reads; Flower's own runtimes set it for their processes."""
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, SERVER_NODE


@contextmanager
def _identity_kept() -> Iterator[None]:
    """Give this process its identity back after the block."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@contextmanager
def identified(run_id: int) -> Iterator[None]:
    """Give this process the identity of a run's ServerApp for the block, then the one that it had."""
    with _identity_kept():
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER_NODE
        yield


def mark_sent(message: Message) -> None:
    """Stamp a message as delivered now, so that a second push of the same object is refused."""
    message.metadata.delivered_at = datetime.now(UTC).isoformat()


def twin(message: Message, content: RecordDict | None = None) -> Message:
    """A message with a copy of the metadata, and this content; None = a copy of its own one, or its error."""
    if content is None and message.has_content():
        content = copied(message.content)
    return _with(message, content, {})


def _with(message: Message, content: RecordDict | None, changed: dict[str, object]) -> Message:
    """A message with this content and a copy of the metadata, of which some entries are others."""
    own = vars(message)
    made, metadata = object.__new__(Message), object.__new__(Metadata)
    metadata.__dict__ = {**vars(own["_metadata"]), **changed}
    made.__dict__ = {"_metadata": metadata, "_content": content, "_error": own["_error"]}
    return made


def copied(content: RecordDict) -> RecordDict:
    """A content of which nothing that can change is shared with the other; the arrays' bytes, which cannot, are."""
    return filled(RecordDict, {key: _copied_record(record) for key, record in content.items()})


def _copied_record(record: ArrayRecord | ConfigRecord | MetricRecord) -> ArrayRecord | ConfigRecord | MetricRecord:
    """A record's own copy, which does not check its items again, with arrays and lists of its own."""
    twin = record.copy()
    items = vars(twin)["_data"]
    for name, value in items.items():
        if isinstance(value, Array):
            items[name] = array = object.__new__(Array)
            vars(array).update(vars(value))
        elif isinstance(value, list):
            items[name] = list(value)
    return twin


def record_bytes(record: ConfigRecord | MetricRecord) -> int:
    """Bytes of a record as Flower serialises it, without the head that names its kind."""
    data = record.deflate()
    return len(data) - data.index(b"\0") - 1


def unavailable(message_id: str, run_id: int) -> Message:
    """The error reply that a SuperLink makes up for a message that it does not have, or no longer has."""
    reason = f"message {message_id} has expired, was pulled before, or was never sent"
    return _made_up(message_id, run_id, Error(MESSAGE_UNAVAILABLE, reason), "", "system", 0.0)


def reply_unavailable(message: Message) -> Message:
    """The error reply that a SuperLink makes up where the reply to a message was there and its own life is over."""
    meta, now = message.metadata, time.time()
    error = Error(CLIENT_APP_OVERDUE, f"the ttl of the reply to message {meta.message_id} is over")
    left = max(0.0, meta.created_at + meta.ttl - now)
    return _made_up(meta.message_id, meta.run_id, error, meta.group_id, meta.message_type, left)


def _made_up(message_id: str, run_id: int, error: Error, group: str, kind: str, ttl: float) -> Message:
    """An error reply of the SuperLink's own to a message."""
    metadata = Metadata(
        run_id=run_id,
        message_id=f"unavailable-{message_id}",
        src_node_id=SERVER_NODE,
        dst_node_id=SERVER_NODE,
        reply_to_message_id=message_id,
        group_id=group,
        message_type=kind,
        created_at=time.time(),
        ttl=ttl,
    )
    return make_message(metadata=metadata, error=error)


def set_message_id(message: Message, identity: str) -> None:
    """Number a message, as Flower's in-memory Grid does; `Message` has no public setter."""
    message.metadata.__dict__["_message_id"] = identity


Records = TypeVar("Records", ArrayRecord, ConfigRecord, MetricRecord, RecordDict)


def array_of(data: bytes, stype: str, *, dtype: str = "uint8", shape: tuple[int, ...] | None = None) -> Array:
    """`Array(dtype, shape, stype, data)`, in a tenth of the time: Flower's constructor tells several forms apart."""
    made = object.__new__(Array)
    made.__dict__ = {"dtype": dtype, "shape": (len(data),) if shape is None else shape, "stype": stype, "data": data}
    return made


_BLANK = {kind: vars(kind()) for kind in (ArrayRecord, ConfigRecord, MetricRecord, RecordDict)}
"""Kind of record -> what an empty one holds."""


def record_kind(own: type[Any]) -> type[Any]:
    """The kind of Flower's that a record's class is or inherits from, as the deprecated `ParametersRecord` does.

    `isinstance` asks Flower's abstract classes, which takes longer than all else for a small message.
    """
    return own if own in _BLANK else next((kind for kind in own.__mro__ if kind in _BLANK), own)


def is_arrays(record: object) -> TypeGuard[ArrayRecord]:
    """Whether a record holds arrays."""
    return record_kind(type(record)) is ArrayRecord


def filled(kind: type[Records], items: dict[str, object]) -> Records:
    """`kind(items)` over the dict itself, where all items have the types that Flower would check one by one."""
    made = object.__new__(kind)
    made.__dict__ = {**_BLANK[kind], "_data": items}
    return made


def renewed(message: Message, content: RecordDict) -> Message:
    """A message made now, with another content and a copy of the metadata, which was checked when it was made first."""
    return _with(message, content, {"_created_at": time.time(), "_delivered_at": ""})


def reply_to(message: Message, content: RecordDict) -> Message:
    """`Message(content, reply_to=message)`, without checking again what the task's metadata was checked for."""
    asked, now = vars(message.metadata), time.time()
    changed = {
        "_created_at": now,
        "_delivered_at": "",
        "_message_id": "",
        "_reply_to_message_id": asked["_message_id"],
        "_src_node_id": asked["_dst_node_id"],
        "_dst_node_id": asked["_src_node_id"],
        "_src_task_id": asked["_dst_task_id"],
        "_dst_task_id": asked["_src_task_id"],
        "_ttl": asked["_created_at"] + asked["_ttl"] - now,
    }
    return _with(message, content, changed)


def envelope(message: Message) -> tuple[str, str, str, tuple[int | None, ...]]:
    """(type, group, number of the message replied to, run, nodes and tasks) of a message; properties take twice as long."""
    meta = vars(message.metadata)
    ids = (meta["_run_id"], meta["_src_node_id"], meta["_dst_node_id"], meta["_src_task_id"], meta["_dst_task_id"])
    return meta["_message_type"], meta["_group_id"], meta["_reply_to_message_id"], ids


def _parts(message: Message) -> tuple[ProtoMessage, ObjectTree, dict[str, int]]:
    """(header, object tree, bytes of every object) of a message as it crosses a SuperLink."""
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        before = message.metadata.message_id
        set_message_id(message, message.object_id)
        header, tree = message_to_proto(remove_content_from_message(message)), get_object_tree(message)
        set_message_id(message, before)
        return header, tree, {name: len(thing.deflate()) for name, thing in objects.items()}


def outbound_bytes(message: Message) -> int:
    """Outbound bytes that a SuperLink counts when a SuperNode pulls this task and its answer is acknowledged."""
    header, tree, objects = _parts(message)
    pulled = PullMessagesResponse(messages_list=[header], message_object_trees=[tree])
    return int(pulled.ByteSize()) + sum(objects.values())


def inbound_bytes(message: Message) -> int:
    """Inbound bytes that a SuperLink counts for this reply: the poll for its task, the push, the objects, the answer.

    The answer to the push is traffic towards the client; it is booked with the reply that caused it.
    """
    header, tree, objects = _parts(message)
    node = Node(node_id=2**63 - 1)
    polled = PullMessagesRequest(node=node).ByteSize()
    pushed = PushMessagesRequest(
        node=node, messages_list=[header], message_object_trees=[tree], clientapp_runtime_list=[0.15]
    ).ByteSize()
    answer = PushMessagesResponse(
        reconnect=Reconnect(reconnect=5),
        results={header.metadata.message_id: 0},
        objects_to_push=list(objects),
        session_id="0" * 64,
    ).ByteSize()
    return int(polled + pushed + answer) + sum(objects.values())


@lru_cache(maxsize=4096)
def chunk_bytes(size: int) -> int:
    """Bytes of the objects that carry an array's `size` bytes of data, each with its head "ArrayChunk  <length>\\0"."""
    full, rest = divmod(size, CHUNK_BYTES)
    objects = [(full, CHUNK_BYTES), (1 if rest else 0, rest)]
    return sum(count * (len("ArrayChunk  ") + len(str(length)) + 1 + length) for count, length in objects)


def with_chunks(message: Message, count: Callable[[Array], int]) -> Message:
    """A message of the same structure whose arrays carry `count(array)` distinct chunks of four bytes instead of data."""
    content, made = RecordDict(), 0
    for key, record in message.content.items():
        if not is_arrays(record):
            # An object starts with its class's name, and a SuperLink knows only Flower's own kinds.
            kind = record_kind(type(record))
            content[key] = filled(kind, dict(record.items()))
            continue
        content[key] = arrays = ArrayRecord()
        for name, array in record.items():
            stand_in = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=b"")
            chunks = [ArrayChunk(memoryview((made + i).to_bytes(4, "little"))) for i in range(count(array))]
            made += len(chunks)
            stand_in.__dict__["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
            arrays[name] = stand_in
    return twin(message, content)


def _heirs(kind: type[object]) -> Iterator[type[object]]:
    """A class and all that inherit from it."""
    yield kind
    for heir in kind.__subclasses__():
        yield from _heirs(heir)


@contextmanager
def results_recorded() -> Iterator[list[object]]:
    """Collect what strategies return in the block: the `Result` of each `start`, or the `History` of a legacy server."""
    from flwr.server.compat import app as legacy

    found: list[object] = []

    def recorded(function: Callable[..., object]) -> Callable[..., object]:
        @wraps(function)
        def run(*args: object, **options: object) -> object:
            found.append(result := function(*args, **options))
            return result

        return run

    before: list[tuple[object, str, object]] = [(legacy, "run_fl", vars(legacy)["run_fl"])]
    before += [(kind, "start", vars(kind)["start"]) for kind in _heirs(Strategy) if "start" in vars(kind)]
    for owner, name, function in before:
        setattr(owner, name, recorded(cast(Callable[..., object], function)))
    try:
        yield found
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def simulate(server_app: ServerApp, client_app: ClientApp, *, nodes: int, workers: int) -> None:
    """Run apps in Flower's own simulation, on as many Ray actors, each on a core; returns when the ServerApp is done."""
    from flwr.simulation import run_simulation  # imports Ray

    resources = {"init_args": {"num_cpus": workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    with _identity_kept():
        run_simulation(server_app, client_app, nodes, backend_config=resources)  # type: ignore[arg-type]
