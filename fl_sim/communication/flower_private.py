"""The names of Flower that are not public, all in one place, with a contract test (`tests/test_flower.py`).

Flower's public API is `flwr.app`, `flwr.serverapp` and `flwr.clientapp`. Running a Grid of our own needs a little more.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.clientapp import ClientApp
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
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
from flwr.proto.node_pb2 import Node
from flwr.serverapp import ServerApp
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
    "Run",
    "adopt_identity",
    "chunk_bytes",
    "inbound_bytes",
    "outbound_bytes",
    "set_message_id",
    "simulate",
    "with_chunks",
]

CHUNK_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
"""Flower cuts an array's data into objects of at most this many bytes."""

CLIENT_APP_RAISED = 2
"""`flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION`."""
CLIENT_APP_OVERDUE = 4
"""`flwr.common.constant.ErrorCode.REPLY_MESSAGE_UNAVAILABLE`: no reply in time."""
CLIENT_ANSWERED_NONSENSE = 100
"""Ours, no code of Flower's: the client function returned something that is no update."""
CLIENT_APP_CRASHED = 0
"""`flwr.common.constant.ErrorCode.UNKNOWN`: Flower's code for a client whose process is gone."""


def adopt_identity() -> None:
    """Give this process the identity that `Message(...)` reads; Flower's own runtimes set it for their processes."""
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def set_message_id(message: Message, identity: str) -> None:
    """Number a message, as Flower's in-memory Grid does; `Message` has no public setter."""
    message.metadata.__dict__["_message_id"] = identity


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


def chunk_bytes(size: int) -> int:
    """Bytes of the objects that carry an array's `size` bytes of data, each with its head "ArrayChunk  <length>\\0"."""
    full, rest = divmod(size, CHUNK_BYTES)
    objects = [(full, CHUNK_BYTES), (1 if rest else 0, rest)]
    return sum(count * (len("ArrayChunk  ") + len(str(length)) + 1 + length) for count, length in objects)


def with_chunks(message: Message, count: Callable[[Array], int]) -> Message:
    """A message of the same structure whose arrays carry `count(array)` distinct chunks of four bytes instead of data."""
    content, made = RecordDict(), 0
    for key, record in message.content.items():
        if not isinstance(record, ArrayRecord):
            content[key] = record
            continue
        content[key] = arrays = ArrayRecord()
        for name, array in record.items():
            stand_in = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=b"")
            chunks = [ArrayChunk(memoryview((made + i).to_bytes(4, "little"))) for i in range(count(array))]
            made += len(chunks)
            stand_in.__dict__["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
            arrays[name] = stand_in
    copied = remove_content_from_message(message)
    copied.content = content
    return copied


def simulate(server_app: ServerApp, client_app: ClientApp, *, nodes: int, workers: int) -> None:
    """Run apps in Flower's own simulation, on as many Ray actors, each on a core; returns when the ServerApp is done."""
    from flwr.simulation import run_simulation  # imports Ray

    resources = {"init_args": {"num_cpus": workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, nodes, backend_config=resources)  # type: ignore[arg-type]
