"""A Grid that books what any Flower app sends over it: dense arrays, as Flower serialised them."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fl_sim.codecs import Description
from fl_sim.communication.flower_private import Run
from fl_sim.communication.flower_traffic import protocol_bytes
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.messages import array_bytes
from fl_sim.runtime.grids.base import LocalGrid


class BookedGrid(Grid):
    """Passes every message on to `inner` and books its arrays in `ledger`, both ways, in section "dense".

    The payload is the arrays' serialised data; configs and metrics are in `protocol_bytes` alone. The round is the
    `server-round` that Flower's strategies write into every task's config, 0 where there is none. An error reply carried
    nothing and books nothing. Replies come as a list, as from Flower's own Grids: some of its strategies read them twice.
    """

    def __init__(self, inner: LocalGrid, ledger: Ledger) -> None:
        self.inner, self.ledger = inner, ledger
        self._round: dict[int, int] = {}

    def _book(self, message: Message, direction: str, node: int) -> Message:
        if message.has_content():
            size = array_bytes(message.content)
            self.ledger.book(
                round=self._round.get(node, 0),
                direction=direction,
                phase=message.metadata.message_type.split(".")[0],
                client=self.inner.partitions[node],
                description=Description({"dense": size}, 0, {"dense": size}, 0.0, "none", "none"),
                protocol_bytes=protocol_bytes(message, direction=direction),
            )
        return message

    def _send(self, messages: Iterable[Message]) -> list[Message]:
        listed = list(messages)
        for message in listed:
            node = message.metadata.dst_node_id
            self._round[node] = _round(message)
            self._book(message, "down", node)
        return listed

    def _receive(self, replies: Iterable[Message]) -> list[Message]:
        return [self._book(reply, "up", reply.metadata.src_node_id) for reply in replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._receive(self.inner.send_and_receive(self._send(messages), timeout=timeout))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(self._send(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._receive(self.inner.pull_messages(message_ids))

    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()


def _round(message: Message) -> int:
    """Round number in a task's config; 0 where it has none."""
    found = (record.get("server-round") for record in message.content.config_records.values())
    return next((number for number in found if isinstance(number, int)), 0)
