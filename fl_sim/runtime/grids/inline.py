"""The default engine: clients run in this process, one after the other; no server, no Ray."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from fl_sim.communication.flower_private import set_message_id
from fl_sim.communication.messages import array_bytes
from fl_sim.core.large import is_large
from fl_sim.runtime.grids.base import LocalGrid, execute, overdue, request_of
from fl_sim.runtime.grids.faults import Overdue, alarm

OVERLAP_BYTES, OVERLAP_S = 500_000, 0.005
"""Below this size of a reply, or this time of a client, handing replies to another thread costs more than it gains."""
HELD, FEW_HELD, FEW_BYTES = 4, 2, 64_000_000
"""Replies that exist at a time where a thread is used; of so many bytes each, fewer."""


class InlineGrid(LocalGrid):
    """Runs the ClientApp in this process.

    Where payloads are large and clients take their time, it runs in a thread of its own while the caller folds the
    replies: decoding and aggregating a dense reply is memory traffic of milliseconds, which a second core takes while
    the next client trains.
    At most two finished replies wait. A reply of a large model is folded before the next client trains, as the memory of two is
    what such a model lacks. Under a time limit it stays in the main thread, which alone
    can be interrupted. `overlap_bytes` of a reply and `overlap_s` of a client are the least for which a thread is used.
    """

    def __init__(
        self,
        app: ClientApp,
        num_nodes: int,
        *,
        timeout_s: float | None = None,
        overlap_bytes: int = OVERLAP_BYTES,
        overlap_s: float = OVERLAP_S,
    ) -> None:
        super().__init__(num_nodes)
        self._app, self._timeout_s = app, timeout_s
        self._overlap_bytes, self._overlap_s = overlap_bytes, overlap_s
        self._client_s = 0.0  # of the last one

    def stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        replies = map(self._run_one, messages)
        size = array_bytes(messages[0].content) if messages else 0
        worthwhile = self._overlap_bytes <= size and self._client_s >= self._overlap_s
        overlap = worthwhile and self._timeout_s is None and not is_large(size)
        return _ahead(replies, held=FEW_HELD if size >= FEW_BYTES else HELD) if overlap else replies

    def _run_one(self, message: Message) -> Message:
        start = time.perf_counter()
        reply = self._execute(request_of(message))
        self._client_s = time.perf_counter() - start
        set_message_id(reply, f"r{message.metadata.message_id}")
        return reply

    def _execute(self, request: Message) -> Message:
        node = request.metadata.dst_node_id
        if self._timeout_s is None:
            return execute(self._app, request, self.contexts[node])
        try:
            with alarm(self._timeout_s):
                return execute(self._app, request, self.contexts[node])
        except Overdue:
            return overdue(request, self.partitions[node], self._timeout_s)


def _ahead(items: Iterator[Message], *, held: int) -> Iterator[Message]:
    """Yield `items` while a thread already computes the next ones; an error there is raised here.

    At most `held` of them exist at a time: the one that is computed, those that wait, and the one that the caller has.
    """
    ready: queue.SimpleQueue[Message | BaseException | None] = queue.SimpleQueue()
    stop, room = threading.Event(), threading.Semaphore(held)

    def produce() -> None:
        torch.set_num_threads(1)
        try:
            while room.acquire() and not stop.is_set():
                ready.put(item := next(items, None))
                if item is None:
                    return
                del item
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=produce, name="fl_sim-clients", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            del item  # before the next one is waited for
            room.release()
    finally:
        stop.set()
        room.release()
        thread.join()
