"""Queries to clients: distortion curves measured by a cohort between aggregation and pruning."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Description, Schema
from fl_sim.communication import messages as wire
from fl_sim.communication.task_header import CurveRequest
from fl_sim.core.seeding import Purpose
from fl_sim.core.types import Task
from fl_sim.sparsity import curve_messages as measuring
from fl_sim.sparsity.curves import Curves, MeasureCurves
from strategies.round_log import RoundFailed, RoundLog, Unusable, require_content
from strategies.server_step import ServerState
from strategies.uplink_receiver import UplinkReceiver


@dataclass(frozen=True)
class CurveQuery:
    """Asks the clients on `grid` in the round that `round_log` belongs to."""

    grid: Grid
    receiver: UplinkReceiver
    round_log: RoundLog

    def __call__(self, state: ServerState, measure: MeasureCurves, images: int) -> list[tuple[Curves, int]]:
        """Distortion curves of `state` from a cohort of clients, each with the number of images behind it.

        Both ways are booked in the phase `query`; the virtual clock does not run, and nobody is late or drops out.

        Raises:
            RoundFailed: no client answered.
        """
        schema = measuring.answer_schema(state.schema.prunable, measure.levels)
        cohorts, sender = self.receiver.cohorts, self.receiver.sender
        size = self.receiver.context.sampling.cohort_size
        cohort = cohorts.cohort(self.grid, state.round, Purpose.CALIBRATION, size)
        task = Task(state.round, state.params, state.mask, seed=self.receiver.context.seed)
        request = CurveRequest(measure.levels, measure.summary, measure.batch_size, images)
        kind = f"{MessageType.QUERY}.{measuring.ACTION}"
        outgoing = sender.outgoing(task, cohort, kind, self.round_log, curves=request)
        replies = self.grid.send_and_receive(outgoing.messages)
        outgoing.book()
        answers = []
        for client, reply in cohorts.in_order(replies, cohort):
            try:
                answers.append(self._answer(state.round, client, reply, schema))
            except Unusable as problem:
                self.receiver.failed(state.round, client, problem, self.round_log)
            else:
                sender.answered(client, state.mask)
        if not answers:
            raise RoundFailed(f"round {state.round}: none of {len(cohort)} clients measured distortion curves")
        return answers

    def _answer(self, number: int, client: int, reply: Message, schema: Schema) -> tuple[Curves, int]:
        require_content(client, reply)
        booking = self.receiver.booking
        described = Description.opaque(wire.array_bytes(reply.content))
        try:
            data = wire.payload(reply.content)
            described = codecs.describe(data, schema=schema)
            answer = measuring.decode_curves(data, schema), wire.read_metrics(reply.content)[0]
        except CorruptPayload as error:
            booking.book("up", number, client, reply, described, phase="query", status="rejected")
            raise Unusable("rejected", f"client {client}: rejected curves: {error}") from error
        booking.book("up", number, client, reply, described, phase="query")
        return answer
