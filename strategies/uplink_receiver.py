"""The uplink: decodes and books replies one at a time, counts failures, and advances the virtual clock."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from flwr.app import Message, RecordDict

from fl_sim.codecs import Description
from fl_sim.core.types import Update
from fl_sim.runtime.grids.folding import FoldedReply, HandedIn, Receipt, Reply
from fl_sim.runtime.server_context import ServerContext, ServerSnapshot
from strategies.cohorts import Cohort, Cohorts
from strategies.decoding import Decoded, Rejected, decoded, decoded_all
from strategies.downlink_sender import DownlinkSender
from strategies.remote_sums import summed
from strategies.round_log import KINDS, RoundLog, Unusable, require_content
from strategies.server_step import ServerState

log = logging.getLogger("fl_sim")


OnReply = Callable[[int, int], None]
"""Called after each reply with (clients that answered, clients of the cohort)."""


AT_ONCE = 64
"""Replies that are decoded together at most: their values lie in memory together."""


def none_ready() -> int:
    """No reply can be had without waiting for a client."""
    return 0


Found = Decoded | Rejected | None
"""What decoding a reply gave; None = it was not decoded yet."""


class UplinkReceiver:
    """Decodes the replies of one model, and tells the `sender` which clients answered.

    Attributes:
        booking: writes what arrives.
        network: simulated links; None = there is no clock.
        simulated_s: seconds on the virtual clock.
        failures: failed client tasks so far, by kind.
    """

    def __init__(self, context: ServerContext, cohorts: Cohorts, sender: DownlinkSender) -> None:
        self.context, self.cohorts, self.sender, self.booking = context, cohorts, sender, sender.booking
        network = context.accounting.network
        self.network = network if network.links or context.devices is not None else None
        self.simulated_s = 0.0
        self.failures = dict.fromkeys(KINDS, 0)

    def restore(self, saved: ServerSnapshot) -> None:
        """Restore the clock and the counts from a snapshot."""
        self.simulated_s, self.failures = saved.simulated_s, dict(saved.failures)

    def updates(
        self,
        start: ServerState,
        cohort: Cohort,
        replies: Iterable[Reply | HandedIn],
        round_log: RoundLog,
        on_reply: OnReply,
        *,
        ready: Callable[[], int] = none_ready,
    ) -> Iterator[Update]:
        """Decode replies into updates in partition order; book each; leave out those that failed.

        Where workers have folded replies, a `Summed` stands for as many of them as it counts.
        `ready` tells how many replies can be had without waiting for a client: they are decoded together.

        `start` is the state that the clients started from; failures and metrics go to `round_log`.

        Raises:
            RoundFailed, UserError: see `RoundLog.require_enough`.
        """
        number, handed_in = start.round + 1, list[RecordDict]()
        answered = itertools.count(1)
        arriving = self.cohorts.in_order(_single(replies, handed_in), cohort)
        for client, reply, found in self._decoded(start, arriving, ready):
            update: Update | None
            try:
                if isinstance(reply, FoldedReply):
                    receipt = self.receipt(number, client, reply, round_log)
                    update, count, metrics = None, receipt.num_examples, receipt.metrics
                else:
                    is_late = partial(self._is_late, client, round_log)
                    update = self.update(start, client, reply, round_log, number=number, is_late=is_late, found=found)
                    count, metrics = update.num_examples, update.metrics
            except Unusable as problem:
                self.failed(number, client, problem, round_log)
            else:
                self.sender.received(client, start.mask)
                round_log.add(count, metrics)
                if update is not None:
                    yield update
                del update  # it was folded: its bytes are free while the next client trains
            del reply, found
            while handed_in:
                if (sums := summed(handed_in.pop(), self.context.exchange.schema)) is not None:
                    yield sums
            on_reply(next(answered), len(cohort))
        if self.network is not None:
            missing = round_log.replies < len(cohort)
            self.simulated_s += self.network.round_s(round_log.finished_s, missing=missing)
        round_log.require_enough(number, len(cohort), self.context.sampling.faults.max_share)

    def _decoded(
        self,
        start: ServerState,
        replies: Iterator[tuple[int, Reply]],
        ready: Callable[[], int],
    ) -> Iterator[tuple[int, Reply, Found]]:
        """Replies, and what came out where several were there and so were decoded together."""
        for client, reply in replies:
            if not (more := ready()):
                yield client, reply, None
                del reply  # nothing here holds a reply while the next one is made
                continue
            batch = deque([(client, reply), *itertools.islice(replies, min(more, AT_ONCE - 1))])
            del reply
            made = self._together(start, batch)
            while batch:
                yield (*batch[0], made.pop(batch.popleft()[0], None))

    def _together(self, start: ServerState, replies: Iterable[tuple[int, Reply]]) -> dict[int, Found]:
        """By client, what decoding those replies that have a payload gave."""
        there = [(client, reply) for client, reply in replies if isinstance(reply, Message) and reply.has_content()]
        contents = [reply.content for _, reply in there]
        found = decoded_all(self.context.exchange, contents, start.params, start.mask)
        return dict(zip((client for client, _ in there), found, strict=True))

    def failed(self, number: int, client: int, problem: Unusable, round_log: RoundLog) -> None:
        """Count a client that failed, and forget what it holds."""
        self.sender.forget(client)
        self.failures[problem.kind] += 1
        round_log.failed(client, problem)
        log.warning("round %d: %s", number, problem)

    def update(
        self,
        start: ServerState,
        client: int,
        reply: Message,
        round_log: RoundLog,
        *,
        number: int,
        is_late: Callable[[Description, float], bool],
        found: Found = None,
    ) -> Update:
        """Decode one reply, and book it in round `number`.

        Args:
            start: the state that the client started from.
            client: its number.
            reply: its message.
            round_log: of the round.
            number: the round that the update counts in.
            is_late: (sizes of the reply, samples that the client took) -> whether it comes too late.
            found: what came out where the reply was decoded already.

        Raises:
            Unusable: the client failed, dropped out or was late, or its bytes are no update of this federation.
        """
        if self.drops(start, client):
            raise Unusable("lost", f"client {client}: dropped out of the simulated network", is_fault=False)
        require_content(client, reply)
        try:
            if found is None:
                found = decoded(self.context.exchange, reply.content, start.params, start.mask)
            if isinstance(found, Rejected):
                raise found
        except Rejected as problem:
            self.booking.book("up", number, client, reply, problem.described, phase="train", status="rejected")
            raise Unusable("rejected", f"client {client}: rejected update: {problem}") from problem
        update, described = found.update, found.described
        late = is_late(described, update.metrics.get("examples", update.num_examples))
        self.booking.book("up", number, client, reply, described, phase="train", status="late" if late else "ok")
        self.booking.record("up", number, client, described, update.mask)
        self.booking.keep("up", number, client, found.payload, start.mask, phase="train")
        if late:
            raise Unusable("late", f"client {client}: its update came too late to be used", is_fault=False)
        if (chosen := found.chosen) is not None:
            round_log.chosen.append(chosen)
        return update

    def receipt(self, number: int, client: int, reply: FoldedReply, round_log: RoundLog) -> Receipt:
        """Book a reply that a worker has folded, in round `number`.

        Raises:
            Unusable: its bytes were no update of this federation, so that the worker left it out.
        """
        receipt, status = reply.receipt, "ok" if reply.receipt.rejected is None else "rejected"
        size = receipt.protocol_bytes
        self.booking.book(
            "up", number, client, reply.message, receipt.described, phase="train", status=status, size=size
        )
        if receipt.rejected is not None:
            raise Unusable("rejected", f"client {client}: rejected update: {receipt.rejected}")
        if receipt.chosen is not None:
            round_log.chosen.append(receipt.chosen)
        return receipt

    def drops(self, start: ServerState, client: int) -> bool:
        """Whether a client that started from this state never answers in the simulated network."""
        return self.network is not None and self.network.drops(
            client=client, round=start.round + 1, seed=self.context.seed
        )

    def _is_late(self, client: int, round_log: RoundLog, described: Description, samples: float) -> bool:
        """Ask the clock, where there is one."""
        if self.network is None:
            return False
        seconds = self.network.seconds(
            client=client,
            seed=self.context.seed,
            down_bytes=round_log.down_bytes[client],
            up_bytes=sum(described.sections.values()),
            samples=samples,
        )
        late = self.network.is_late(seconds)
        if not late:
            round_log.finished_s.append(seconds)
        return late


def _single(replies: Iterable[Reply | HandedIn], handed_in: list[RecordDict]) -> Iterator[Reply]:
    """The replies of clients; what workers have handed in is put apart."""
    for reply in replies:
        if isinstance(reply, HandedIn):
            handed_in.append(reply.content)
        else:
            yield reply
        del reply
