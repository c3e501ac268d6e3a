"""One call of a foreign ClientApp, in whichever process its clients run: apart from all other clients, checked, told on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from flwr.app import Context, Error, Message

from fl_sim.communication.flower_private import (
    CLIENT_APP_CRASHED,
    CLIENT_APP_RAISED,
    TTL_TOLERANCE_S,
    Metadata,
    copied,
    with_content,
)
from fl_sim.communication.messages import PARTITION
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.runtime.grids.base import execute

Call = Callable[[Message, Context], Message]
"""What a ClientApp is when it is called."""


@dataclass(frozen=True)
class Outcome:
    """What a client gave: its reply, and its context as it left it. None = nothing of the context is kept."""

    reply: Message
    context: Context | None = None


class Lane(Protocol):
    """A place where one client runs at a time; it is used by one thread."""

    def run(self, message: Message, context: Context, seed: int) -> Outcome:
        """Run a client on copies of the message and the context; returns when it is done."""

    def close(self) -> None:
        """End its process; a client at work is ended with it. Harmless when called twice."""


def call(app: Call, message: Message, context: Context, seed: int) -> Outcome:
    """Run a client on a message and a context that are its own.

    The client finds global generators that are seeded for this call alone, and leaves no setting of the process behind: no
    gradient mode, default dtype, working folder or environment variable. What it did to its context counts only if it
    answers, and never with a changed `run_config`.
    """
    configured, asked, given = dict(context.run_config), copy.copy(message.metadata), []

    def answered(message: Message, context: Context) -> Message:
        given.append(reply := app(message, context))
        return reply

    with unchanged_settings(), seeded(seed):
        reply = execute(answered, message, context)
    if not given or given[0] is not reply:  # it raised, or returned no Message
        return Outcome(reply)
    if why := _unfit(reply.metadata, asked):
        return _refused(message, context, CLIENT_APP_RAISED, f"the ClientApp returned {why}")
    if context.run_config != configured:
        return _refused(message, context, CLIENT_APP_CRASHED, "a client must not change context.run_config")
    if reply.has_content():
        reply.content = copied(reply.content)  # it may have sent what it keeps
    return Outcome(reply, context)


def _unfit(reply: Metadata, asked: Metadata) -> str | None:
    """What a SuperLink would drop a reply for; the ServerApp would wait for it until the message's life is over."""
    if reply.reply_to_message_id != asked.message_id or reply.src_node_id != asked.dst_node_id:
        return "a Message that is no reply to its task"
    most = asked.created_at + asked.ttl - reply.created_at
    return (
        f"a reply with ttl = {reply.ttl:g}; allowed: up to {most:.1f} s" if reply.ttl > most + TTL_TOLERANCE_S else None
    )


def _refused(message: Message, context: Context, code: int, why: str) -> Outcome:
    return Outcome(Message(Error(code, f"client {context.node_config[PARTITION]}: {why}"), reply_to=message))


class InlineLane:
    """The one lane of the inline engine: clients run in this process, in a thread of their own."""

    def __init__(self, app: Call) -> None:
        self._app = app
        self._threads: int | None = torch.get_num_threads()

    def run(self, message: Message, context: Context, seed: int) -> Outcome:
        """Run a client on copies."""
        if self._threads is not None:  # PyTorch's threads are those of the thread that asks
            torch.set_num_threads(self._threads)
            self._threads = None
        return call(self._app, with_content(message, copied(message.content)), own(context), seed)

    def close(self) -> None:
        """Do nothing: there is no process to end."""


def own(context: Context) -> Context:
    """A copy of a context that a client may change."""
    twin = copy.copy(context)
    twin.state = copied(context.state)
    twin.node_config, twin.run_config = dict(context.node_config), dict(context.run_config)
    return twin
