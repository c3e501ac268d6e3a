"""Base of the Grids: node numbers, message identities, and the execution of one client.

A Grid is Flower's own seam between a ServerApp and its clients (`flwr.serverapp.Grid`, a public ABC). Replies are
streamed in the order of the messages, so that a consumer that folds them needs no more memory than one reply.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fl_sim.communication.flower_private import (
    CLIENT_ANSWERED_NONSENSE,
    CLIENT_APP_OVERDUE,
    CLIENT_APP_RAISED,
    Run,
    adopt_identity,
    filled,
    is_arrays,
    renewed,
    set_message_id,
)
from fl_sim.core.errors import in_one_line, users_line
from fl_sim.core.numbered import Numbered
from fl_sim.runtime.client.host import BadUpdate
from fl_sim.runtime.grids.allocator import keep_freed_memory
from fl_sim.runtime.grids.faults import Overdue
from fl_sim.runtime.state.contexts import Contexts

FIRST_NODE = 1000
log = logging.getLogger("fl_sim")


class DeviceLost(RuntimeError):
    """The GPU of this process answers no more, to no client: no fault of the one that was at work."""


def device_is_lost() -> bool:
    """Whether the GPU that this process uses answers no more; a CUDA context does not recover from that."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def execute(app: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """Run one client. Whatever it raises becomes an error reply that names the partition, as on Flower's runtimes.

    Raises:
        DeviceLost: the next client in this process would fail as this one did.
    """
    client = message.metadata.dst_node_id - FIRST_NODE  # now: the client may change message and context
    try:
        reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")
        return reply
    except (KeyboardInterrupt, Overdue):
        raise
    except BaseException as error:  # a client may raise what is no Exception, such as SystemExit
        where = f" ({line})" if (line := users_line(error)) else ""
        reason = f"client {client}: {type(error).__name__}: {in_one_line(error)}{where}"
        log.debug("%s", reason, exc_info=True)
        if device_is_lost():
            raise DeviceLost(f"the GPU answers no more; {reason}") from error
        code = CLIENT_ANSWERED_NONSENSE if isinstance(error, BadUpdate) else CLIENT_APP_RAISED
        return Message(Error(code, reason), reply_to=message)


def overdue(message: Message, partition: int, seconds: float) -> Message:
    """The error reply of a client that took longer than it may."""
    reason = f"client {partition}: no answer within faults.timeout_s = {seconds:g} s"
    return Message(Error(CLIENT_APP_OVERDUE, reason), reply_to=message)


def request_of(message: Message) -> Message:
    """The message as its client receives it."""
    return renewed(message, isolated(message.content))


def isolated(content: RecordDict) -> RecordDict:
    """Copy the mutable records, as a real transport would; arrays hold immutable bytes and are shared."""
    return filled(RecordDict, {key: r if is_arrays(r) else r.copy() for key, r in content.items()})


class LocalGrid(Grid):
    """A Grid whose nodes are the partitions 0..n-1 of one simulation; node id = 1000 + partition.

    Attributes:
        runs_beside: whether clients run in other processes, while the caller does something else.
    """

    runs_beside = False

    def __init__(self, num_nodes: int) -> None:
        adopt_identity()
        keep_freed_memory()
        self._run = Run.create_empty(1)
        self.numbered = 0
        self._sent: dict[str, Message] = {}
        self.contexts = Contexts(range(FIRST_NODE, FIRST_NODE + num_nodes))

    @property
    def partitions(self) -> Mapping[int, int]:
        """Node id -> partition."""
        return Numbered(self.contexts.nodes, range(len(self.contexts)))

    @abstractmethod
    def stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        """Run the messages' clients; yield one reply per message, in the messages' order, as they become ready."""

    def ready(self) -> int:
        """How many further replies `stream` yields at once, without a client that works before."""
        return 0

    def close(self) -> None:
        """Give back processes and memory; harmless when called twice."""

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(self._stamp(message))
            self._sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return list(self.stream([self._sent.pop(i) for i in list(message_ids) if i in self._sent], None))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        listed = list(messages)
        for message in listed:
            self._stamp(message)
        return self.stream(listed, timeout)

    def _stamp(self, message: Message) -> str:
        self.numbered += 1
        identity = str(self.numbered)
        set_message_id(message, identity)
        return identity
