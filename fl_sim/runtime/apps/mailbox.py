"""Messages between a ServerApp and its clients: one at a time for each node, in the order in which they were pushed."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from fl_sim.runtime.apps.booking import Measured

POLLED_S = 0.25
"""A ServerApp that polls is told of quick clients although a slow one is at work; this long a client counts as quick."""
SHARE = 4
"""A client is slow when it has taken this part of the time that a ServerApp waits for replies, or that a message lives."""

MOST_S = 3600.0
"""The longest wait at a time: the system's timers do not take any number."""


@dataclass
class Waiting:
    """A caller that waits until `left` more of its messages are answered."""

    left: int
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class Letter:
    """One message on its way.

    Attributes:
        number: its place among all messages of the run, from 1.
        turn: its place among the messages of its node, from 0.
        message: a copy of what was pushed; nobody changes it.
        round: of the run, for the ledger.
        measured: its content, for the ledger; None where it carries an error.
        reply: None while there is none.
        waiting: who waits for it.
    """

    number: int
    turn: int
    message: Message
    round: int
    measured: Measured | None = None
    reply: Message | None = None
    waiting: Waiting | None = None

    @property
    def node(self) -> int:
        """The node that it goes to."""
        return self.message.metadata.dst_node_id

    @property
    def expires(self) -> float:
        """Unix time at which its life is over, and with it that of its reply."""
        return expires(self.message)


def expires(message: Message) -> float:
    """Unix time at which the life of a message or of a reply is over."""
    return message.metadata.created_at + message.metadata.ttl


class Mailbox:
    """Letters by their ids, and those that no client has begun; any thread may call any method."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._letters: dict[str, Letter] = {}
        self._queues: dict[int, deque[Letter]] = {}
        self._ready: deque[int] = deque()
        self._busy: set[int] = set()
        self._closed = False
        self._broken: BaseException | None = None
        self._polled = math.inf  # seconds of patience of a ServerApp that polls
        self._limits: list[float] = []  # and of each caller that waits
        self._since = math.inf  # when the one lane of the inline engine took what it is at

    def put(self, letters: Sequence[Letter]) -> None:
        """Queue letters."""
        with self._changed:
            for letter in letters:
                self._letters[letter.message.metadata.message_id] = letter
                queue = self._queues.setdefault(letter.node, deque())
                queue.append(letter)
                if len(queue) == 1 and letter.node not in self._busy:
                    self._ready.append(letter.node)
            self._changed.notify_all()

    def take(self, *, spare: bool = False) -> Letter | None:
        """Wait for the next letter whose node is free, which is busy from then on; None = no more will come.

        A letter that has expired in the queue is passed over, as a node would not get it any more. `spare` takes one only
        while what another lane is at lasts longer than the ServerApp has patience for.
        """
        with self._changed:
            while True:
                if self._closed and (spare or not self._ready):
                    return None
                left = self._patience_left() if spare else 0.0
                if not self._ready or left > 0:
                    self._changed.wait(min(left, MOST_S) if self._ready and left < math.inf else None)
                    continue
                node = self._ready.popleft()
                letter = self._queues[node].popleft()
                if letter.expires > time.time():
                    self._busy.add(node)
                    self._since = self._since if spare else time.monotonic()
                    return letter
                if self._queues[node]:
                    self._ready.append(node)

    def _patience_left(self) -> float:
        """Seconds until the ServerApp has none left with the client that is at work."""
        at_work = 0.0 if self._since == math.inf else time.monotonic() - self._since
        return min((self._polled, *self._limits)) - at_work

    def finish(self, letter: Letter, reply: Message, *, spare: bool = False) -> None:
        """Put the reply to a letter that was taken; its node is free."""
        with self._changed:
            letter.reply = reply
            self._since = self._since if spare else math.inf
            self._busy.discard(letter.node)
            if self._queues[letter.node]:
                self._ready.append(letter.node)
                self._changed.notify_all()
            waiting = letter.waiting
            if waiting is not None:
                waiting.left -= 1
                if not waiting.left:
                    waiting.done.set()

    def wait(self, letters: Sequence[Letter], seconds: float | None) -> None:
        """Wait until every one of these is answered or has expired, at most for these seconds."""
        end = None if seconds is None else time.time() + seconds
        with self._changed:
            pending = [letter for letter in letters if letter.reply is None]
            waiting = Waiting(len(pending))
            for letter in pending:
                letter.waiting = waiting
            lives = (letter.expires - time.time() for letter in pending)
            limit = min((seconds or math.inf, *lives)) / SHARE
            self._limits.append(limit)
            self._polled = math.inf
            self._changed.notify_all()
        try:
            self._wait(pending, waiting, end)
        finally:
            with self._changed:
                self._limits.remove(limit)
        self.raise_broken()

    def _wait(self, pending: Sequence[Letter], waiting: Waiting, end: float | None) -> None:
        while pending and not waiting.done.is_set():
            self.raise_broken()
            now = time.time()
            pending = [letter for letter in pending if letter.reply is None and letter.expires > now]
            if not pending or (end is not None and now >= end):
                return
            until = min(letter.expires for letter in pending)
            waiting.done.wait(min(MOST_S, max(0.0, min(until, end or until) - now) + 1e-4))

    def fetch(self, message_id: str, *, polled: bool) -> Letter | None:
        """A letter that has not expired; None where there is none. An answered or expired one is forgotten.

        `polled`: the ServerApp asks by itself, and if there is no answer yet it will ask again.
        """
        with self._changed:
            letter = self._letters.get(message_id)
            expired = letter is not None and letter.expires <= time.time()
            if letter is not None and (expired or letter.reply is not None):
                del self._letters[message_id]
            elif letter is not None and polled and self._polled > POLLED_S:
                self._polled = POLLED_S
                self._changed.notify_all()
            return None if expired else letter

    def close(self) -> None:
        """Let `take` give None once no letter is left."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Forget the letters that no client has begun, and close."""
        with self._changed:
            self._ready.clear()
            self._queues = {node: deque() for node in self._queues}
        self.close()

    def break_down(self, error: BaseException) -> None:
        """Let everybody who waits for replies raise this error: nothing will answer any more."""
        with self._changed:
            self._broken = self._broken or error
            waiting = {id(w): w for letter in self._letters.values() if (w := letter.waiting) is not None}
        for one in waiting.values():
            one.done.set()

    def raise_broken(self) -> None:
        """Raise the error of `break_down`, if there was one."""
        if self._broken is not None:
            raise self._broken
