"""The Grid contract of Flower as a ServerApp that asks and a ClientApp that answers: row -> what was observed.

Nothing here knows which runtime it is run by.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

NODES = 4
LIMIT_S = 0.75
"""What a ServerApp waits for quick clients beside one that never ends by itself."""

client_app = ClientApp()


def answer(message: Message, **values: object) -> Message:
    """A reply with these values."""
    return Message(RecordDict({"told": ConfigRecord(values)}), reply_to=message)


def counted(context: Context) -> int:
    seen = context.state["seen"]["times"] + 1 if "seen" in context.state else 1
    context.state["seen"] = ConfigRecord({"times": seen})
    return seen


@client_app.query()
def who(message: Message, context: Context) -> Message:
    return answer(message, partition=context.node_config["partition-id"])


@client_app.query("state")
def state(message: Message, context: Context) -> Message:
    return answer(
        message, keys=sorted(context.state), times=context.state["seen"]["times"] if "seen" in context.state else 0
    )


@client_app.train("count")
def count(message: Message, context: Context) -> Message:
    return answer(message, times=counted(context))


@client_app.train("slow")
def slow(message: Message, context: Context) -> Message:
    """Work until a file is there, so that a slow client costs no more time than the question needs."""
    end = time.monotonic() + 30
    while not Path(message.content["ask"]["until"]).exists() and time.monotonic() < end:
        time.sleep(0.01)
    return answer(message, times=counted(context))


@client_app.train("pause")
def pause(message: Message, context: Context) -> Message:
    time.sleep(0.25)
    return answer(message, times=counted(context))


@client_app.train("forget")
def forget(message: Message, context: Context) -> Message:
    context.state.clear()
    return answer(message)


@client_app.train("break")
def break_(message: Message, context: Context) -> Message:
    counted(context)
    context.state["rubbish"] = MetricRecord({"x": 1})
    raise ValueError("by design")


@client_app.train("own_error")
def own_error(message: Message, context: Context) -> Message:
    counted(context)
    return Message(Error(77, "my own"), reply_to=message)


@client_app.train("unfit")
def unfit(message: Message, context: Context) -> Message:
    """Answer as somebody else, or for longer than the message lives."""
    if message.content["ask"]["as"] == "another":
        message.metadata.dst_node_id = 5
        return answer(message)
    reply = answer(message)
    reply.metadata.ttl = 1e6
    return reply


@client_app.train("consume")
def consume(message: Message, context: Context) -> Message:
    """Take the records apart, and tell what was there."""
    found = message.content
    items, keys = len(found["ask"]["list"]), sorted(found)
    arrays = found["arrays"].to_numpy_ndarrays(keep_input=False)
    found["ask"]["list"].append(9)
    found["ask"]["new"] = 1
    del found["metrics"]
    return answer(message, items=items, keys=keys, arrays=len(arrays), left=len(found["arrays"]))


@client_app.train("run_config")
def run_config(message: Message, context: Context) -> Message:
    counted(context)
    context.run_config["of"] = "the client"
    return answer(message)


@client_app.train("share")
def share(message: Message, context: Context) -> Message:
    """Send what the state holds."""
    if "kept" not in context.state:
        context.state["kept"] = ArrayRecord({"a": Array(np.arange(3.0))})
        context.state["list"] = ConfigRecord({"list": [1, 2]})
    kept, listed = context.state["kept"], context.state["list"]
    return Message(RecordDict({"kept": kept, "list": listed}), reply_to=message)


@client_app.train("metadata")
def metadata(message: Message, context: Context) -> Message:
    meta = message.metadata
    return answer(
        message,
        run=meta.run_id,
        context_run=context.run_id,
        own=meta.dst_node_id == context.node_id,
        source=meta.src_node_id,
        message_id=meta.message_id,
        reply_to=meta.reply_to_message_id,
        group=meta.group_id,
        type=meta.message_type,
        ttl=meta.ttl,
        node_config=sorted(context.node_config),
        number=context.node_config["num-partitions"],
    )


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return answer(message, done=True)


@dataclass(frozen=True)
class Asker:
    """The server's side: `nodes` in the order of their partitions; slow clients work until the file `gate` is there."""

    grid: Grid
    context: Context
    nodes: Sequence[int]
    gate: Path

    def slow(self, **options: object) -> Message:
        """A message that keeps the first node at work until `open`."""
        self.gate.unlink(missing_ok=True)
        return self.message(self.nodes[0], "slow", values={"until": str(self.gate)}, **options)

    def open(self) -> None:
        self.gate.touch()

    def message(self, node: int, action: str, **options: object) -> Message:
        values = options.pop("values", {})
        kind = options.pop("kind", f"train.{action}")
        return Message(RecordDict({"ask": ConfigRecord(values)}), node, kind, **options)

    def ask(self, messages: Iterable[Message], **options: object) -> list[Message]:
        replies = list(self.grid.send_and_receive(messages, **options))
        place = {node: place for place, node in enumerate(self.nodes)}
        return sorted(replies, key=lambda reply: place.get(reply.metadata.src_node_id, -1))

    def states(self) -> list[tuple[list[str], int]]:
        replies = self.ask(self.message(node, "", kind="query.state") for node in self.nodes)
        return [(list(r.content["told"]["keys"]), r.content["told"]["times"]) for r in replies]

    def reset(self) -> None:
        self.ask(self.message(node, "forget") for node in self.nodes)

    def gather(self, ids: Iterable[str], within: float = 30.0) -> list[Message]:
        """Poll until all of these have answered."""
        missing, found, end = set(ids), [], time.monotonic() + within
        while missing and time.monotonic() < end:
            for reply in self.grid.pull_messages(sorted(missing)):
                missing.discard(reply.metadata.reply_to_message_id)
                found.append(reply)
            time.sleep(0.02)
        assert not missing, "no answer"
        return found


def times(replies: Iterable[Message]) -> list[int]:
    return [reply.content["told"]["times"] for reply in replies]


def code(reply: Message) -> int | None:
    return reply.error.code if reply.has_error() else None


def never_pulled(ask: Asker) -> object:
    """Pushed and never pulled: the clients run all the same."""
    ask.grid.push_messages([ask.message(node, "count") for node in ask.nodes])
    end = time.monotonic() + 30
    while (found := [n for _, n in ask.states()]) != [1] * NODES and time.monotonic() < end:
        time.sleep(0.05)
    return found


def polled(ask: Asker) -> object:
    """What is finished comes first, while a slow client is still at work."""
    ids = list(ask.grid.push_messages([ask.slow(), ask.message(ask.nodes[1], "count")]))
    end, first = time.monotonic() + 30, []
    while not first and time.monotonic() < end:
        first = list(ask.grid.pull_messages(ids))
        time.sleep(0.02)
    quick = [reply.metadata.src_node_id == ask.nodes[1] for reply in first]
    ask.open()
    rest = ask.gather(set(ids) - {reply.metadata.reply_to_message_id for reply in first})
    return quick, times(rest)


def pulled_before_it_is_finished(ask: Asker) -> object:
    """Nothing is there yet."""
    ids = list(ask.grid.push_messages([ask.slow()]))
    before = len(list(ask.grid.pull_messages(ids)))
    ask.open()
    return before, times(ask.gather(ids))


def pulled_again(ask: Asker) -> object:
    """A reply that was pulled already."""
    ids = list(ask.grid.push_messages([ask.message(ask.nodes[0], "count")]))
    first = ask.gather(ids)
    again = list(ask.grid.pull_messages(ids))
    return times(first), [code(r) for r in again], [r.metadata.reply_to_message_id == ids[0] for r in again]


def pulled_one_of_two(ask: Asker) -> object:
    """Pulling one leaves the other."""
    ids = list(ask.grid.push_messages([ask.message(node, "count") for node in ask.nodes[:2]]))
    return times(ask.gather(ids[1:])), times(ask.gather(ids[:1]))


def timeout(ask: Asker) -> object:
    """One client takes longer than `timeout`."""
    messages = [ask.slow(), *(ask.message(node, "count") for node in ask.nodes[1:])]
    start = time.monotonic()
    replies = ask.ask(messages, timeout=LIMIT_S)
    seconds = time.monotonic() - start
    ask.open()
    late = ask.gather([messages[0].metadata.message_id])
    return times(replies), LIMIT_S <= seconds < LIMIT_S + 5, times(late)


def no_time(ask: Asker) -> object:
    """`timeout=0` sends and does not wait."""
    message = ask.message(ask.nodes[0], "count")
    replies = ask.ask([message], timeout=0)
    return len(replies), times(ask.gather([message.metadata.message_id]))


def ttl(ask: Asker) -> object:
    """A client takes longer than the message lives: error 3, and what it did to its state stays."""
    message = ask.slow(ttl=LIMIT_S)
    replies = ask.ask([message, ask.message(ask.nodes[1], "count")])
    ask.open()
    end = time.monotonic() + 30
    while ask.states()[0][1] == 0 and time.monotonic() < end:
        time.sleep(0.02)
    errors = [
        (code(r), r.metadata.reply_to_message_id == message.metadata.message_id) for r in replies if r.has_error()
    ]
    return errors, times(r for r in replies if r.has_content()), ask.states()[0][1]


def unknown_node(ask: Asker) -> object:
    """Skipped."""
    messages = [ask.message(77, "count"), ask.message(ask.nodes[0], "count")]
    ids = list(ask.grid.push_messages(messages))
    found = times(ask.gather(ids))
    return len(ids), found, times(ask.ask([ask.message(77, "count"), ask.message(ask.nodes[0], "count")]))


def unknown_message(ask: Asker) -> object:
    """An id that nobody pushed."""
    return [(code(r), r.metadata.reply_to_message_id) for r in ask.grid.pull_messages(["nobody"])]


def two_to_one_node(ask: Asker) -> object:
    """In order."""
    return sorted(times(ask.ask([ask.message(ask.nodes[0], "count") for _ in range(3)])))


def in_order(ask: Asker) -> object:
    """A slow message to a node, then a quick one: the second waits for the first."""
    first = ask.message(ask.nodes[0], "pause")
    second = ask.message(ask.nodes[0], "count")
    replies = {r.metadata.reply_to_message_id: r for r in ask.ask([first, second])}
    return times([replies[first.metadata.message_id], replies[second.metadata.message_id]])


def emptied_state(ask: Asker) -> object:
    ask.ask([ask.message(ask.nodes[0], "count")])
    ask.ask([ask.message(ask.nodes[0], "forget")])
    return ask.states()[0]


def state_of_a_client_that_raises(ask: Asker) -> object:
    ask.ask([ask.message(ask.nodes[0], "count")])
    replies = ask.ask([ask.message(ask.nodes[0], "break")])
    return [code(r) for r in replies], "by design" in replies[0].error.reason, ask.states()[0]


def error_of_the_clients_own(ask: Asker) -> object:
    """A client may answer with an error: its code and reason arrive, and what it kept stays kept."""
    (reply,) = ask.ask([ask.message(ask.nodes[0], "own_error")])
    return code(reply), reply.error.reason, ask.states()[0]


def unfit_replies(ask: Asker) -> object:
    """Replies that a SuperLink does not take."""
    messages = [
        ask.message(node, "unfit", values={"as": kind}, ttl=LIMIT_S)
        for node, kind in zip(ask.nodes, ("another", "itself"), strict=False)
    ]
    return [code(reply) for reply in ask.ask(messages)]


def consumed_records(ask: Asker) -> object:
    """Each client has its own copy, the server keeps its own."""
    content = RecordDict(
        {
            "ask": ConfigRecord({"list": [1, 2]}),
            "arrays": ArrayRecord({"a": Array(np.arange(3.0)), "b": Array(np.arange(2.0))}),
            "metrics": MetricRecord({"x": 1.0}),
        }
    )
    messages = [Message(content, node, "train.consume") for node in [*ask.nodes, ask.nodes[0]]]
    found = [dict(r.content["told"]) for r in ask.ask(messages)]
    same = all(one == found[0] for one in found)
    return same, found[0], sorted(content), len(content["arrays"]), list(content["ask"]["list"]), sorted(content["ask"])


def consumed_replies(ask: Asker) -> object:
    """What the server does to a reply does not reach the client's state."""
    seen = []
    for _ in range(2):
        (reply,) = ask.ask([ask.message(ask.nodes[0], "share")])
        seen.append((len(reply.content["kept"]), list(reply.content["list"]["list"])))
        reply.content["kept"].clear()
        reply.content["list"]["list"].append(3)
    return seen


def changed_run_config(ask: Asker) -> object:
    """Refused, and the state is not kept."""
    replies = ask.ask([ask.message(ask.nodes[0], "run_config")])
    return [code(r) for r in replies], "run_config" in replies[0].error.reason, ask.states()[0]


def threads(ask: Asker) -> object:
    """Six threads at once, one message each, as a legacy server sends them."""
    nodes = [*ask.nodes, *ask.nodes[:2]]

    def one(node: int) -> tuple[bool, int]:
        (reply,) = ask.grid.send_and_receive([ask.message(node, "count")])
        return reply.metadata.src_node_id == node, reply.content["told"]["times"]

    with ThreadPoolExecutor(len(nodes)) as pool:
        found = list(pool.map(one, nodes))
    return all(own for own, _ in found), sorted(number for _, number in found)


def sent_twice(ask: Asker) -> object:
    """The same Message again."""
    message = ask.message(ask.nodes[0], "count")
    ask.ask([message])
    return refused(lambda: ask.ask([message]))


def pushed_twice_at_once(ask: Asker) -> object:
    """The same Message twice in one call."""
    message = ask.message(ask.nodes[0], "forget")
    return refused(lambda: ask.grid.push_messages([message, message]))


def reply_sent(ask: Asker) -> object:
    """A reply is no instruction."""
    (reply,) = ask.ask([ask.message(ask.nodes[0], "forget")])
    return refused(lambda: ask.grid.push_messages([reply]))


def refused(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return type(error).__name__
    return "accepted"


def expired(ask: Asker) -> object:
    """A message whose life is over when it is pushed."""
    message = ask.message(ask.nodes[0], "count", ttl=0.05)
    time.sleep(0.1)
    return len(list(ask.grid.push_messages([message])))


def unregistered(ask: Asker) -> object:
    """An action that the app does not have."""
    (reply,) = ask.ask([ask.message(ask.nodes[0], "nowhere")])
    return code(reply), "nowhere" in reply.error.reason


def nothing(ask: Asker) -> object:
    return list(ask.grid.push_messages([])), list(ask.grid.pull_messages([])), list(ask.grid.send_and_receive([]))


def generators(ask: Asker) -> object:
    """Messages may come from a generator, ids go into one."""
    ids = iter(list(ask.grid.push_messages(ask.message(node, "count") for node in ask.nodes)))
    return times(ask.gather(ids))


def what_clients_read(ask: Asker) -> object:
    message = ask.message(ask.nodes[2], "metadata", group_id="7", ttl=99.0)
    (reply,) = ask.ask([message])
    found, sent = dict(reply.content["told"]), message.metadata
    return (
        found["run"] == sent.run_id == ask.context.run_id == ask.grid.run.run_id == found["context_run"],
        found["own"],
        found["source"],
        found["message_id"] == sent.message_id != "",
        found["reply_to"],
        found["group"],
        found["type"],
        found["ttl"],
        found["node_config"],
        found["number"],
    )


def what_replies_carry(ask: Asker) -> object:
    message = ask.message(ask.nodes[2], "count", group_id="7")
    (reply,) = ask.ask([message])
    meta, sent = reply.metadata, message.metadata
    return (
        meta.run_id == sent.run_id,
        meta.src_node_id == ask.nodes[2],
        meta.dst_node_id,
        meta.reply_to_message_id == sent.message_id,
        meta.message_id not in ("", sent.message_id),
        meta.group_id,
        meta.message_type,
        0 < meta.ttl <= sent.ttl,
        meta.delivered_at != "",
    )


def nodes(ask: Asker) -> object:
    ids = list(ask.grid.get_node_ids())
    infos = list(ask.grid.get_nodes())
    return len(set(ids)), 0 in ids, {info.node_id for info in infos} == set(ids), {info.status for info in infos}


def changed_after_the_reply(ask: Asker) -> object:
    """A record that the server changes between two calls."""
    content = RecordDict({"ask": ConfigRecord({"list": [1]}), "arrays": ArrayRecord(), "metrics": MetricRecord()})
    found = []
    for number in (2, 3):
        (reply,) = ask.ask([Message(content, ask.nodes[0], "train.consume")])
        found.append(reply.content["told"]["items"])
        content["ask"]["list"].append(number)
    return found


def run_id(ask: Asker) -> object:
    return ask.grid.run.run_id != 1, ask.grid.run.run_id == ask.context.run_id


TOOK = {"items": 2, "keys": ["arrays", "ask", "metrics"], "arrays": 2, "left": 0}
READ = (True, True, 1, True, "", "7", "train.metadata", 99.0, ["num-partitions", "partition-id"], NODES)
ROWS: dict[Callable[[Asker], object], object] = {
    never_pulled: [1] * NODES,
    polled: ([True], [1]),
    pulled_before_it_is_finished: (0, [1]),
    pulled_again: ([1], [3], [True]),
    pulled_one_of_two: ([1], [1]),
    timeout: ([1, 1, 1], True, [1]),
    no_time: (0, [1]),
    ttl: ([(3, True)], [1], 1),
    unknown_node: (1, [1], [2]),
    unknown_message: [(3, "nobody")],
    two_to_one_node: [1, 2, 3],
    in_order: [1, 2],
    emptied_state: ([], 0),
    state_of_a_client_that_raises: ([2], True, (["seen"], 1)),
    error_of_the_clients_own: (77, "my own", (["seen"], 1)),
    unfit_replies: [2, 2],
    consumed_records: (True, TOOK, ["arrays", "ask", "metrics"], 2, [1, 2], ["list"]),
    consumed_replies: [(1, [1, 2])] * 2,
    changed_run_config: ([0], True, ([], 0)),
    threads: (True, [1, 1, 1, 1, 2, 2]),
    sent_twice: "ValueError",
    pushed_twice_at_once: "ValueError",
    reply_sent: "ValueError",
    expired: 0,
    unregistered: (2, True),
    nothing: ([], [], []),
    generators: [1] * NODES,
    what_clients_read: READ,
    what_replies_carry: (True, True, 1, True, True, "7", "train.count", True, True),
    nodes: (NODES, False, True, {"online"}),
    changed_after_the_reply: [1, 2],
    run_id: (True, True),
}
"""Row -> what is observed here, and on Flower unless `FLOWERS` says otherwise."""
FLOWERS: dict[Callable[[Asker], object], Sequence[object]] = {
    in_order: ([1, 1], [1, 2]),  # two messages of a node may run at once, and the state of one of them is lost
    consumed_replies: ([(1, [1, 2]), (0, [1, 2, 3])],),  # the server's change reaches the client's state
    unfit_replies: ([3, 3],),  # when the messages' life is over
    pushed_twice_at_once: ("accepted", "ValueError"),  # as fast as a node takes the first one
}
"""Rows in which we differ on purpose -> what is observed in Flower's simulation."""


def server_app(found: dict[str, object], rows: Iterable[Callable[[Asker], object]]) -> ServerApp:
    """Ask every question of these rows, and leave the answers in `found`; an error of a question is its answer."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < NODES:
            time.sleep(0.1)
        ids = list(grid.get_node_ids())
        replies = grid.send_and_receive(Message(RecordDict(), node, "query") for node in ids)
        partition = {r.metadata.src_node_id: r.content["told"]["partition"] for r in replies}
        with tempfile.TemporaryDirectory() as folder:
            asker = Asker(grid, context, sorted(ids, key=partition.__getitem__), Path(folder, "gate"))
            for row in rows:
                asker.reset()
                try:
                    found[row.__name__] = row(asker)
                except Exception as error:
                    found[row.__name__] = f"{type(error).__name__}: {error}"

    return app
