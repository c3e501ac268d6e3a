"""Flower's Grid contract for foreign apps, on every engine: what differs is only the lanes that clients run in.

Pushed messages start at once, a lane each, one at a time for a node and in order. Pulls return what is finished. A message
lives for its `ttl`, `timeout` bounds the wait alone. Messages, replies and contexts are copies, so that neither side sees
what the other one does to them. docs/flower_apps.md has the whole table; each row is a test.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fl_sim.communication.flower_private import (
    CLIENT_APP_RAISED,
    EARLIEST,
    SERVER_NODE,
    NodeInfo,
    Run,
    copied,
    mark_sent,
    reply_unavailable,
    set_message_id,
    twin,
    unavailable,
)
from fl_sim.communication.messages import PARTITION
from fl_sim.core.errors import UserError
from fl_sim.core.seeding import Purpose, derive
from fl_sim.runtime.apps.booking import Book, Exchange, Measured, round_of
from fl_sim.runtime.apps.client import Lane
from fl_sim.runtime.apps.mailbox import Letter, Mailbox, expires
from fl_sim.runtime.grids.base import FIRST_NODE

Scalar = bool | int | float | str
log = logging.getLogger("fl_sim")


class AppGrid(Grid):
    """A Grid whose nodes are 1000, 1001, ...: the partitions 0, 1, ... of one run.

    `lanes` take all messages; `spare` ones take some only while a client of the one lane lasts too long for a ServerApp that
    polls or waits for a limited time.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        num_nodes: int,
        *,
        spare: Sequence[Lane] = (),
        run_id: int,
        run_config: Mapping[str, Scalar],
        node_config: Callable[[int], Mapping[str, Scalar]],
        seed: int,
    ) -> None:
        self._run = Run.create_empty(run_id)
        self._nodes = range(FIRST_NODE, FIRST_NODE + num_nodes)
        self._run_config, self._node_config, self._seed = dict(run_config), node_config, seed
        self.contexts: dict[int, Context] = {}
        self.book = Book()
        self.failures: Counter[str] = Counter()
        self._box = Mailbox()
        self._lock = threading.Lock()
        self._pushed = 0
        self._turns: dict[int, int] = {}
        self._lanes = [*lanes, *spare]
        self._threads = [
            threading.Thread(target=self._serve, args=(lane, lane in spare), name="fl_sim-clients", daemon=True)
            for lane in self._lanes
        ]
        for thread in self._threads:
            thread.start()

    # The ServerApp's side.

    def set_run(self, run: Run) -> None:
        """Take what describes this run.

        Raises:
            TypeError, RuntimeError: no Run, or another one; as on Flower's own Grids.
        """
        if not isinstance(run, Run):
            raise TypeError(f"`run` must be an instance of Run, got {type(run).__name__}")
        if run.run_id != self._run.run_id:
            raise RuntimeError(f"there is no run {run.run_id} here, only {self._run.run_id}")
        self._run = run

    @property
    def run(self) -> Run:
        return Run(**vars(self._run))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, status="online") for node in self._nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [letter.message.metadata.message_id for letter in self._push(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._box.raise_broken()
        return self._pull(message_ids, polled=True)

    def _pull(self, message_ids: Iterable[str], *, polled: bool) -> list[Message]:
        replies: list[Message] = []
        for message_id in dict.fromkeys(message_ids):
            letter = self._box.fetch(message_id, polled=polled)
            if letter is None:
                replies.append(unavailable(message_id, self._run.run_id))
            elif letter.reply is not None:
                mark_sent(letter.reply)
                expired = expires(letter.reply) <= time.time()
                replies.append(reply_unavailable(letter.message) if expired else letter.reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        letters = self._push(messages)
        if timeout is not None and not timeout > 0:
            return []
        self._box.wait(letters, timeout)
        return self._pull([letter.message.metadata.message_id for letter in letters], polled=False)

    def _push(self, messages: Iterable[Message]) -> list[Letter]:
        """Check, number and copy messages, and hand them to the lanes together.

        Raises:
            ValueError: a reply, a message without a life, or one that was sent before; as on Flower's own Grids.
            UserError: a content that Flower cannot serialise; as on a SuperLink.
        """
        letters: list[Letter] = []
        shared: dict[int, tuple[RecordDict, RecordDict, Measured]] = {}
        listed = list(messages)  # a generator may use this grid itself
        with self._lock:
            try:
                for message in listed:
                    self._require_new(message)
                    if why := self._unsendable(message):
                        log.warning("a message was skipped: %s", why)
                        continue
                    letters.append(self._letter(message, shared))
            finally:
                self._box.put(letters)
        return letters

    @staticmethod
    def _require_new(message: Message) -> None:
        meta = message.metadata
        if meta.reply_to_message_id or meta.ttl <= 0 or meta.delivered_at:
            why = "a reply" if meta.reply_to_message_id else "sent before" if meta.delivered_at else f"ttl = {meta.ttl}"
            raise ValueError(f"Invalid message ({why}): {message}")

    def _unsendable(self, message: Message) -> str | None:
        """Why a message cannot be delivered."""
        meta = message.metadata
        if meta.dst_node_id not in self._nodes:
            return f"there is no node {meta.dst_node_id}; nodes are {self._nodes[0]} to {self._nodes[-1]}"
        if meta.created_at < EARLIEST:
            return f"its created_at = {meta.created_at:g} is before {EARLIEST:.0f}, the earliest that Flower takes"
        if expires(message) <= time.time():
            return f"its ttl of {meta.ttl:g} s is over"
        if meta.run_id != self._run.run_id:
            return f"it belongs to run {meta.run_id}, not to {self._run.run_id}"
        if meta.src_node_id != SERVER_NODE:
            return f"it comes from node {meta.src_node_id}, not from the server's ({SERVER_NODE})"
        return None if meta.message_type else "it has no type"

    def _letter(self, message: Message, shared: dict[int, tuple[RecordDict, RecordDict, Measured]]) -> Letter:
        """Number a message, and copy it; `shared` has the copies of what several messages of a call carry."""
        content, measured = None, None
        if message.has_content():
            if id(message.content) not in shared:
                content = copied(message.content)
                shared[id(message.content)] = message.content, content, Measured.of(content)
            _, content, measured = shared[id(message.content)]
        self._pushed += 1
        node = message.metadata.dst_node_id
        turn = self._turns.get(node, 0)
        self._turns[node] = turn + 1
        set_message_id(message, self._identity(self._pushed, "0"))
        mark_sent(message)
        return Letter(self._pushed, turn, twin(message, content), round_of(message), measured)

    def _identity(self, number: int, kind: str) -> str:
        """An id as long as those on Flower's network, which are hashes."""
        return f"{self._run.run_id:016x}{kind}{number:047x}"

    # The clients' side.

    def _serve(self, lane: Lane, spare: bool) -> None:
        """The life of a lane's thread: deliver letters until none will come."""
        try:
            while (letter := self._box.take(spare=spare)) is not None:
                self._box.finish(letter, self._reply(letter, lane), spare=spare)
        except BaseException as error:
            self._box.break_down(error)

    def _reply(self, letter: Letter, lane: Lane) -> Message:
        node, client = letter.node, letter.node - FIRST_NODE
        context = self.contexts.get(node) or self._fresh(node)
        exchange = Exchange(letter.number, letter.round, client)
        self.book.note(letter.message, "down", exchange, late=False, measured=letter.measured)
        outcome = lane.run(letter.message, context, derive(self._seed, letter.turn, client, Purpose.CLIENT))
        if outcome.context is not None:
            self.contexts[node] = outcome.context
        reply = outcome.reply
        if isinstance(reply, Message):
            try:
                self.book.note(reply, "up", exchange, late=letter.expires <= time.time())
            except UserError as error:
                reply = Error(CLIENT_APP_RAISED, f"client {client}: {error}")
        if isinstance(reply, Error):  # not by the message that the client got: it may have changed that one's metadata
            reply = Message(reply, reply_to=letter.message)
        set_message_id(reply, self._identity(letter.number, "1"))
        if reply.has_error():
            self._report(reply.error.reason or f"client {client}: error {reply.error.code}")
        return reply

    def _fresh(self, node: int) -> Context:
        client = node - FIRST_NODE
        config = {**self._node_config(client), PARTITION: client, "num-partitions": len(self._nodes)}
        return Context(self._run.run_id, node, config, RecordDict(), dict(self._run_config))

    def _report(self, reason: str) -> None:
        self.failures[reason] += 1
        log.warning("%s", reason)

    # The end.

    def finish(self) -> None:
        """Run what was pushed and never pulled, and wait for what is at work."""
        self._box.close()
        for thread in self._threads:
            thread.join()
        self._box.raise_broken()

    def close(self) -> None:
        """Forget what no client has begun, and end the lanes; harmless when called twice."""
        self._box.abandon()
        for lane in self._lanes:
            lane.close()
