"""Queries to clients between rounds: distortion curves for pruning, losses for the selection of a cohort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Description, Schema
from fl_sim.communication import gradient_query, loss_query
from fl_sim.communication import messages as wire
from fl_sim.communication.task_header import CurveRequest, GradientRequest, Request
from fl_sim.core.seeding import Purpose
from fl_sim.core.types import Params, Task
from fl_sim.sparsity import curve_messages as measuring
from fl_sim.sparsity.curves import Curves, MeasureCurves
from strategies.cohorts import Cohort
from strategies.flights import devices_of
from strategies.round_log import RoundFailed, RoundLog, Unusable, require_content
from strategies.server_step import ServerState
from strategies.uplink_receiver import UplinkReceiver

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Query:
    """Asks the clients on `grid` in the round that `round_log` belongs to.

    Both ways are booked in the phase `query`. The virtual clock waits for the slowest client's download and upload; what it
    computes takes no time, and nobody is late or drops out.
    """

    grid: Grid
    receiver: UplinkReceiver
    round_log: RoundLog

    def curves(self, state: ServerState, measure: MeasureCurves, images: int) -> list[tuple[Curves, int]]:
        """Distortion curves of `state` from a cohort of clients, each with the number of images behind it.

        Raises:
            RoundFailed: no client answered.
        """
        schema = measuring.answer_schema(state.schema.prunable, measure.levels)
        size = self.receiver.context.sampling.cohort_size
        cohort = self.receiver.cohorts.cohort(self.grid, state.round, Purpose.CALIBRATION, size)
        request = CurveRequest(measure.levels, measure.summary, measure.batch_size, images)

        def read(data: bytes | memoryview) -> dict[str, list[float]]:
            return measuring.decode_curves(data, schema)

        return list(self._asked(state, state.round, cohort, measuring.ACTION, schema, read, request).values())

    def __call__(self, state: ServerState, measure: MeasureCurves, images: int) -> list[tuple[Curves, int]]:
        """`curves`, for a slot that is given the whole query."""
        return self.curves(state, measure, images)

    def gradients(self, state: ServerState, share: float) -> list[tuple[Params, int]]:
        """Gradients of `state` from a cohort of clients, each with the number of samples behind it; zero where none was sent.

        Args:
            state: the model, and its pruning mask.
            share: of the pruned weights, those with the largest gradients; 1 = the gradients of all weights.

        Raises:
            RoundFailed: no client answered.
        """
        schema, size = state.schema.prunable_part, self.receiver.context.sampling.cohort_size
        cohort = self.receiver.cohorts.cohort(self.grid, state.round, Purpose.CALIBRATION, size)

        def read(data: bytes | memoryview) -> Params:
            return gradient_query.decode_gradients(data, schema)

        request = GradientRequest(float(share))
        return list(self._asked(state, state.round, cohort, gradient_query.ACTION, schema, read, request).values())

    def losses(self, state: ServerState, clients: Sequence[int]) -> dict[int, float]:
        """Of each client that answers its mean loss of `state`, before the next round.

        Raises:
            RoundFailed: no client answered.
        """
        nodes = self.receiver.cohorts.nodes(self.grid)
        cohort = [(client, nodes[client]) for client in clients]
        answers = self._asked(
            state, state.round + 1, cohort, loss_query.ACTION, loss_query.SCHEMA, loss_query.decode_loss
        )
        return {client: loss for client, (loss, _) in answers.items()}

    def _asked(
        self,
        state: ServerState,
        number: int,
        cohort: Cohort,
        action: str,
        schema: Schema,
        read: Callable[[bytes | memoryview], Answer],
        question: Request | None = None,
    ) -> dict[int, tuple[Answer, int]]:
        """Client -> (its answer, the number of samples behind it)."""
        cohorts, sender = self.receiver.cohorts, self.receiver.sender
        task = Task(number, state.params, state.mask, seed=self.receiver.context.seed)
        outgoing = sender.outgoing(task, cohort, f"{MessageType.QUERY}.{action}", self.round_log, request=question)
        replies = self.grid.send_and_receive(outgoing.messages)
        outgoing.book()
        answers = {}
        problems: list[str] = []
        waited: list[float] = []
        for client, reply in cohorts.in_order(replies, cohort):
            try:
                answers[client] = self._answer(number, client, reply, action, schema, read)
            except Unusable as problem:
                self.receiver.failed(number, client, problem, self.round_log)
                problems.append(str(problem))
            else:
                sender.answered(client, state.mask)
                waited.append(self._seconds(client, wire.array_bytes(reply.content)))
        if not answers:
            first = problems[0] if problems else "no client answered in time"
            raise RoundFailed(f"round {number}: none of {len(cohort)} clients answered a query for {action}: {first}")
        self.receiver.simulated_s += max(waited)
        return answers

    def _seconds(self, client: int, up_bytes: int) -> float:
        """Seconds until a client's answer is there; 0 without a clock."""
        if self.receiver.network is None:
            return 0.0
        link = devices_of(self.receiver.context)(client).link
        return link.down_s(self.round_log.down_bytes[client]) + link.up_s(up_bytes)

    def _answer(
        self,
        number: int,
        client: int,
        reply: Message,
        action: str,
        schema: Schema,
        read: Callable[[bytes | memoryview], Answer],
    ) -> tuple[Answer, int]:
        require_content(client, reply)
        booking = self.receiver.booking
        described = Description.opaque(wire.array_bytes(reply.content))
        try:
            data = wire.payload(reply.content)
            described = codecs.describe(data, schema=schema)
            answer = read(data), wire.read_metrics(reply.content)[0]
        except CorruptPayload as error:
            booking.book("up", number, client, reply, described, phase="query", status="rejected")
            raise Unusable("rejected", f"client {client}: rejected {action}: {error}") from error
        booking.book("up", number, client, reply, described, phase="query")
        return answer
