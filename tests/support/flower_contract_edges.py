"""More rows of the Grid contract: messages, replies, contexts and values at the edge of what Flower takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flower_contract import NODES, Asker, answer, client_app, code, counted, refused, times
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

UNFIT: Mapping[str, tuple[str, object]] = {
    "elsewhere": ("dst_node_id", 7),
    "over": ("ttl", -1.0),
    "early": ("created_at", 1000.0),
    "marked": ("delivered_at", "yesterday"),
}


@client_app.train("spoil_reply")
def spoil_reply(message: Message, context: Context) -> Message:
    """Answer with one entry of the reply's metadata changed."""
    reply = answer(message, times=counted(context))
    setattr(reply.metadata, message.content["ask"]["entry"], message.content["ask"]["value"])
    return reply


@client_app.train("rename")
def rename(message: Message, context: Context) -> Message:
    """Change everything that tells which client this is, then raise."""
    counted(context)
    context.node_config.clear()
    context.node_id = message.metadata.dst_node_id = 5
    raise ValueError("by design")


@client_app.train("further")
def further(message: Message, context: Context) -> Message:
    """Add a key to the node config; tell whether an earlier call's is there."""
    before = context.node_config.get("further", "")
    context.node_config["further"] = "kept"
    return answer(message, before=before)


@client_app.train("error")
def error(message: Message, context: Context) -> Message:
    """Read the error that the server sent."""
    return answer(message, code=message.error.code, reason=message.error.reason, content=message.has_content())


@client_app.train("stamps")
def stamps(message: Message, context: Context) -> Message:
    return answer(message, stamped="T" in message.metadata.delivered_at)


@client_app.train("return")
def return_(message: Message, context: Context) -> Message:
    """Send the content back."""
    return Message(message.content, reply_to=message)


@client_app.train("huge_number")
def huge_number(message: Message, context: Context) -> Message:
    """Answer with what Flower's protocol has no type for."""
    counted(context)
    return Message(RecordDict({"told": MetricRecord({"x": 2**70})}), reply_to=message)


def error_sent(ask: Asker) -> object:
    """A message that carries an error in the place of a content."""
    message = ask.message(ask.nodes[0], "error")
    vars(message)["_content"] = None
    message.error = Error(55, "the server's")
    (reply,) = ask.ask([message])
    return dict(reply.content["told"])


def delivered(ask: Asker) -> object:
    """When a message and its reply were delivered stands in both, and in the client's."""
    message = ask.message(ask.nodes[0], "stamps")
    (reply,) = ask.ask([message])
    return "T" in message.metadata.delivered_at, reply.content["told"]["stamped"], "T" in reply.metadata.delivered_at


def misdirected_replies(ask: Asker) -> object:
    """Replies whose metadata a SuperLink refuses: an error, and what the client kept stays kept."""
    messages = [
        ask.message(node, "spoil_reply", values={"entry": entry, "value": value}, ttl=1.0)
        for node, (entry, value) in zip(ask.nodes, UNFIT.values(), strict=True)
    ]
    return [code(reply) for reply in ask.ask(messages)], [n for _, n in ask.states()]


def changed_replies(ask: Asker) -> object:
    """Entries of a reply's metadata that a client may change."""
    changes = {"message_type": "query.state", "group_id": "other", "src_task_id": 9}
    messages = [
        ask.message(node, "spoil_reply", values={"entry": entry, "value": value})
        for node, (entry, value) in zip(ask.nodes, changes.items(), strict=False)
    ]
    return [getattr(r.metadata, entry) for r, entry in zip(ask.ask(messages), changes, strict=True)]


def reply_expired(ask: Asker) -> object:
    """A reply whose own life is over when it is pulled."""
    message = ask.message(ask.nodes[0], "spoil_reply", values={"entry": "ttl", "value": 0.5}, group_id="7")
    ids = list(ask.grid.push_messages([message]))
    end = time.monotonic() + 30
    while ask.states()[0][1] == 0 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.6)
    (reply,) = ask.grid.pull_messages(ids)
    meta = reply.metadata
    return code(reply), meta.reply_to_message_id == ids[0], meta.group_id, meta.message_type, meta.src_node_id


def changed_before_it_starts(ask: Asker) -> object:
    """What the server does to a message between its push and its client's start."""
    content = RecordDict({"ask": ConfigRecord({"x": 1})})
    slow, message = ask.slow(), Message(content, ask.nodes[0], "train.return")
    ids = list(ask.grid.push_messages([slow, message]))
    content["ask"]["x"] = 2
    ask.open()
    replies = {reply.metadata.reply_to_message_id: reply for reply in ask.gather(ids)}
    return replies[message.metadata.message_id].content["ask"]["x"]


def to_the_server(ask: Asker) -> object:
    """A message to the server's own node."""
    return len(list(ask.grid.push_messages([ask.message(1, "count", ttl=0.5)])))


def made_long_ago(ask: Asker) -> object:
    """A message from before Flower's protocol."""
    message = ask.message(ask.nodes[0], "count", ttl=1e10)
    message.metadata.created_at = 1000.0
    return len(list(ask.grid.push_messages([message])))


def no_number(ask: Asker) -> object:
    """A `timeout` that is no number does not wait."""
    message = ask.message(ask.nodes[0], "count")
    return len(ask.ask([message], timeout=float("nan"))), times(ask.gather([message.metadata.message_id]))


def set_run(ask: Asker) -> object:
    """The run may be set again, not to another one."""
    run = ask.grid.run
    another = type(run)(**{**vars(run), "run_id": 77})
    outcomes = [refused(lambda value=value: ask.grid.set_run(value)) for value in ("no run", another, run)]
    return outcomes, ask.grid.run.run_id == run.run_id


def renamed_and_raised(ask: Asker) -> object:
    """A client that changes what names it, and raises: nothing of that is kept."""
    replies = ask.ask([ask.message(ask.nodes[0], "rename")])
    (who,) = ask.ask([Message(RecordDict(), ask.nodes[0], "query")])
    return [code(reply) for reply in replies], who.content["told"]["partition"], ask.states()[0]


def node_config_kept(ask: Asker) -> object:
    """What a client adds to its node config is there the next time."""
    return [ask.ask([ask.message(ask.nodes[1], "further")])[0].content["told"]["before"] for _ in range(2)]


def odd_values(ask: Asker) -> object:
    """Records without entries, arrays without dimensions or elements, values at the edge of their types."""
    arrays = {
        "none": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3)),
        "complex": np.array([1 + 2j]),
        "big-endian": np.array([1, 2], ">i4"),
        "text": np.array(["ab", "c"]),
    }
    records = {name: Array(array) for name, array in arrays.items()}
    records["raw"] = Array("bfloat16", (2,), "raw", b"abcd")
    content = RecordDict(
        {
            "arrays": ArrayRecord(records),
            "empty": ArrayRecord(),
            "metrics": MetricRecord({"inf": float("inf"), "list": [], "most": 2**64 - 1, "least": -(2**63)}),
            "config": ConfigRecord({"text": "ü\n", "bytes": b"\0\xff", "flags": [True, False], "none": []}),
        }
    )
    replies = ask.ask(
        [Message(content, ask.nodes[0], "train.return"), Message(RecordDict(), ask.nodes[1], "train.return")]
    )
    return replies[0].content == content, list(replies[1].content)


def too_big_to_send(ask: Asker) -> object:
    """An integer that Flower's protocol cannot hold, in a message."""
    content = RecordDict({"ask": ConfigRecord({"x": 2**70})})
    return refused(lambda: ask.ask([Message(content, ask.nodes[0], "train.return")]))


def too_big_to_answer(ask: Asker) -> object:
    """The same in a reply."""
    (reply,) = ask.ask([ask.message(ask.nodes[0], "huge_number")])
    return code(reply), ask.states()[0][1]


EDGES: dict[Callable[[Asker], object], object] = {
    error_sent: {"code": 55, "reason": "the server's", "content": False},
    delivered: (True, True, True),
    misdirected_replies: ([2] * NODES, [1] * NODES),
    changed_replies: ["query.state", "other", 9],
    reply_expired: (4, True, "7", "train.spoil_reply", 1),
    changed_before_it_starts: 1,
    to_the_server: 0,
    made_long_ago: 0,
    no_number: (0, [1]),
    set_run: (["TypeError", "RuntimeError", "accepted"], True),
    renamed_and_raised: ([2], 0, ([], 0)),
    node_config_kept: ["", "kept"],
    odd_values: (True, []),
    too_big_to_send: "UserError",
    too_big_to_answer: (2, 1),
}
"""Row -> what is observed here, and on Flower unless `FLOWERS_EDGES` says otherwise."""
FLOWERS_EDGES: dict[Callable[[Asker], object], Sequence[object]] = {
    misdirected_replies: (([3] * NODES, [1] * NODES),),  # when the messages' life is over
    changed_before_it_starts: (1, 2),  # as fast as the node takes it
    to_the_server: (1,),  # nobody answers
    too_big_to_send: ("accepted",),  # nothing is serialised in its simulation; on its SuperLink the push fails
    too_big_to_answer: ((None, 1),),
}
"""Rows in which we differ on purpose -> what is observed in Flower's simulation."""
