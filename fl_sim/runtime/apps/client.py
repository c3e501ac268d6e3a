"""One call of a foreign ClientApp, in whichever process its clients run: apart from all other clients, checked, told on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from flwr.app import Context, Error, Message, RecordDict

from fl_sim.communication.flower_private import (
    CLIENT_APP_CRASHED,
    CLIENT_APP_RAISED,
    TTL_TOLERANCE_S,
    Metadata,
    copied,
    twin,
)
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.runtime.grids.base import FIRST_NODE, execute

Call = Callable[[Message, Context], Message]
"""What a ClientApp is when it is called."""


@dataclass(frozen=True)
class Outcome:
    """What a client gave: its reply, or the error that answers for it, and its context as it left it (None = as it was)."""

    reply: Message | Error
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
    returns a Message, and never with a changed `run_config`.
    """
    configured, asked, given = dict(context.run_config), copy.copy(message.metadata), []

    def answered(message: Message, context: Context) -> Message:
        given.append(reply := app(message, context))
        return reply

    with unchanged_settings(), seeded(seed):
        reply = execute(answered, message, context)
    if not given or given[0] is not reply:  # it raised, or returned no Message
        return Outcome(reply.error)
    if why := _spoilt(context, configured):
        return Outcome(error_of(asked.dst_node_id, CLIENT_APP_CRASHED, why))
    if why := _unfit(reply.metadata, asked):
        return Outcome(error_of(asked.dst_node_id, CLIENT_APP_RAISED, f"the ClientApp returned {why}"), context)
    if reply.has_content():
        reply.content = copied(reply.content)  # it may have sent what it keeps
    return Outcome(reply, context)


def _spoilt(context: Context, configured: Mapping[str, object]) -> str | None:
    """What a client did to its context that makes it unfit for the next call."""
    if context.run_config != configured:
        return "a client must not change context.run_config"
    kept = isinstance(context.state, RecordDict) and isinstance(context.node_config, dict)
    return None if kept else "a client must leave a RecordDict in context.state and a dict in context.node_config"


def _unfit(reply: Metadata, asked: Metadata) -> str | None:
    """What a SuperLink would drop a reply for; the ServerApp would wait for it until the message's life is over."""
    way_back = asked.message_id, asked.dst_node_id, asked.src_node_id
    if (reply.reply_to_message_id, reply.src_node_id, reply.dst_node_id) != way_back:
        return "a Message that is no reply to its task"
    if reply.delivered_at:
        return f"a reply with delivered_at = {reply.delivered_at!r}; a reply is marked when it is pulled"
    now, end, over = time.time(), asked.created_at + asked.ttl, reply.created_at + reply.ttl
    if over > end + TTL_TOLERANCE_S:
        return f"a reply with ttl = {reply.ttl:g}; allowed: up to {end - reply.created_at:.1f} s"
    return f"a reply whose ttl = {reply.ttl:g} is over already" if over <= now < end else None


def error_of(node: int, code: int, why: str) -> Error:
    """The error that answers for the client of this node."""
    return Error(code, f"client {node - FIRST_NODE}: {why}")


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
        return call(self._app, twin(message), own(context), seed)

    def close(self) -> None:
        """Do nothing: there is no process to end."""


def own(context: Context) -> Context:
    """A copy of a context that a client may change."""
    made = copy.copy(context)
    made.state = copied(context.state)
    made.node_config, made.run_config = dict(context.node_config), dict(context.run_config)
    return made
