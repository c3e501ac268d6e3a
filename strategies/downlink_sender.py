"""The downlink: encodes one payload for each distinct thing that a client holds, and tracks what each client holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from flwr.app import Message, MessageType, RecordDict

from fl_sim import codecs
from fl_sim.codecs import Description, Opened
from fl_sim.codecs.sections import extra_section
from fl_sim.communication import messages as wire
from fl_sim.communication.exchange import Frozen
from fl_sim.communication.flower_private import renewed
from fl_sim.communication.flower_traffic import Form
from fl_sim.communication.sparse_broadcast import EncodedModel
from fl_sim.communication.task_header import Request
from fl_sim.core.large import is_large
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Mask, Params, Task, UserError
from fl_sim.runtime.budget_coding import BudgetCoding
from fl_sim.runtime.server_context import ServerContext, ServerSnapshot
from strategies.booking import Booking
from strategies.codec_state import CodecState
from strategies.cohorts import Cohort
from strategies.downlink_types import Downlink, configured_types
from strategies.held_masks import ClientMasks
from strategies.published_model import SparseBroadcastServer
from strategies.round_log import RoundLog

PHASES = {MessageType.TRAIN: "train", MessageType.EVALUATE: "evaluate"}


@dataclass(frozen=True)
class Outgoing:
    """Messages of one round, ready to be sent.

    Attributes:
        cohort: clients that they go to, in the same order.
        messages: one for each client.
        entries: functions that write one message into the ledger each.
    """

    cohort: Cohort
    messages: Sequence[Message]
    entries: Sequence[Callable[[], None]] = ()

    @property
    def nodes(self) -> list[int]:
        """Node ids of the cohort."""
        return [node for _, node in self.cohort]

    def book(self) -> None:
        """Write the messages into the ledger. Call it after dispatch: booking before would keep every worker waiting."""
        for entry in self.entries:
            entry()


Encode = Callable[[Cohort, RoundLog], Outgoing]
"""(clients, log that their bytes are added to) -> messages of one task."""


class DownlinkSender:
    """Encodes the tasks of one model.

    Attributes:
        booking: writes what is sent.
        client_masks: client -> the pruning mask it holds, and whether it has built the frozen weights.
        published: the sparse broadcast; None = the whole model is sent.
        codec_state: what a codec of the user's own keeps of the server; tasks of training alone go on with it.
    """

    def __init__(self, context: ServerContext, downlink: Downlink) -> None:
        self.context, self.downlink, self.exchange = context, downlink, context.exchange
        if codecs.is_relative(self.exchange.uplink.values) and downlink is not configured_types:
            raise UserError(
                f"wire.uplink.values = {self.exchange.uplink.values!r} codes against the model that clients received, and "
                "this strategy's downlink rounds it; allowed: a strategy that leaves the downlink to wire.downlink"
            )
        self.booking = Booking(context.accounting, context.exchange.schema)
        self.client_masks = ClientMasks()
        first = context.exchange.schema.flat(context.initial)
        rule = context.broadcast
        self.codec_state = state = CodecState()
        self.published = (
            None
            if rule is None
            else SparseBroadcastServer(rule, context.exchange, context.seed, first, codec_state=state)
        )

    # -- messages ------------------------------------------------------------------------------------------------------

    def outgoing(
        self, task: Task, cohort: Cohort, kind: str, log: RoundLog, *, request: Request | None = None
    ) -> Outgoing:
        """Encode a task for each client of a cohort; clients that hold the same share one payload.

        The bytes for each client are added to `log`. `request` asks for what clients are to measure.
        """
        return self.encoder(task, kind, request=request)(cohort, log)

    def encoder(self, task: Task, kind: str, *, request: Request | None = None) -> Encode:
        """`outgoing` for several cohorts of one task, whose clients share payloads too."""
        prepared: dict[tuple[int, Frozen | None], tuple[RecordDict, Description, Form]] = {}
        schema, encoded_for = self.exchange.schema, self._encoder(task, kind)
        extra = self._extra(task) if kind == MessageType.TRAIN else {}
        blank = Message(RecordDict(), 0, kind, group_id=str(task.round))

        def outgoing(cohort: Cohort, log: RoundLog) -> Outgoing:
            messages: list[Message] = []
            entries: list[Callable[[], None]] = []
            for client, node in cohort:
                held_mask = self.client_masks.held_mask(client) if task.mask is not None else None
                frozen = None if self.client_masks.has_frozen(client) else self.exchange.frozen
                encoded = encoded_for(client, held_mask)
                key = id(encoded), frozen
                if key not in prepared:
                    described = encoded.described(schema, held_mask)
                    if frozen is not None:
                        described = described.plus("auxiliary", frozen.size)
                    for name, payload in extra.items():
                        described = described.plus(extra_section(name), len(payload))
                    data, header = bytes(encoded.data), encoded.header
                    content = wire.task_content(
                        task, data, frozen=frozen, broadcast=header, request=request, extra=extra
                    )
                    prepared[key] = content, described, Form.of(content)
                content, described, form = prepared[key]
                message = renewed(blank, content)
                message.metadata.dst_node_id = node
                log.down_bytes[client] = sum(described.sections.values())
                messages.append(message)
                entries.append(
                    partial(self._book, kind, task.round, client, message, described, form, encoded, held_mask)
                )
            return Outgoing(cohort, messages, entries)

        return outgoing

    def standing_for(self, task: Task, sent: Outgoing) -> Opened | None:
        """The payload in which the parameters of a task lie as they are, so that the server needs no second copy of a large
        model while clients train; None where that saves little, or where they are encoded otherwise."""
        exchange = self.exchange
        if task.mask is not None or not sent.messages or not is_large(exchange.schema.nbytes):
            return None
        if self.published is not None or exchange.downlink.content != "parameters":
            return None
        payload = codecs.opened(wire.payload(sent.messages[0].content), schema=exchange.schema)
        return payload if payload.is_in_place else None

    def _extra(self, task: Task) -> dict[str, bytes]:
        """The payloads of a task's extra tensors, the same for every client.

        Raises:
            UserError: tensors that are not those that the client declares, or that are not finite.
        """
        if not (task.extra or self.exchange.extra.down):
            return {}
        try:
            return self.exchange.encode_extra_down(task, seed=derive(self.context.seed, task.round, Purpose.ENCODING))
        except ValueError as error:
            raise UserError(f"round {task.round}: strategy: {error}") from error

    def _book(
        self,
        kind: str,
        number: int,
        client: int,
        message: Message,
        described: Description,
        form: Form,
        encoded: EncodedModel,
        held_mask: Mask | None,
    ) -> None:
        phase = PHASES.get(kind, "query")
        self.booking.book("down", number, client, message, described, phase=phase, form=form)
        self.booking.keep("down", number, client, encoded.data, held_mask, phase=phase)
        if kind == MessageType.TRAIN:
            self.booking.record("down", number, client, described, encoded.sent_mask)

    def _encoder(self, task: Task, kind: str) -> Callable[[int, Mask | None], EncodedModel]:
        """(client, pruning mask that it holds) -> the model encoded for it; equal payloads are one object."""
        if self.published is not None and kind in PHASES:
            after = task.round - 1 if kind == MessageType.TRAIN else task.round
            self.published.publish(after, task.params, task.mask)
            return self.published.encoded
        if kind not in PHASES and isinstance(self.exchange.downlink, BudgetCoding):
            raise UserError(
                "wire.budget: this strategy asks clients questions, whose messages no budget holds; remove one"
            )
        seed = derive(self.context.seed, task.round, Purpose.ENCODING)
        types = self.downlink(self.context, task, seed)
        made: dict[bytes, EncodedModel] = {}

        def encoded(client: int, held_mask: Mask | None) -> EncodedModel:
            key = b"" if held_mask is None else codecs.mask_hash(held_mask)
            if key not in made:
                with self.codec_state.next(keep=kind == MessageType.TRAIN) as state:
                    data = self.exchange.encode_down(
                        task, self.context.initial, held_mask=held_mask, seed=seed, types=types, state=state
                    )
                made[key] = EncodedModel(data, task.mask)
            return made[key]

        return encoded

    # -- a sparse broadcast --------------------------------------------------------------------------------------------

    def start(self, params: Params) -> Params:
        """The parameters that this round's clients start from; `params` are the global ones."""
        return params if self.published is None else self.published.params

    def with_residual(self, new: Params, before: Params) -> Params:
        """Error feedback of the downlink: `new` plus what of the global parameters `before` was not published yet."""
        if self.published is None:
            return new
        schema = self.exchange.schema
        residual = schema.flat(before) - schema.flat(self.published.params)
        residual[schema.prunable_size :] = 0.0
        return schema.view(schema.flat(new) + residual)

    # -- what each client holds ----------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Version of the last published model; 0 without a sparse broadcast."""
        return 0 if self.published is None else self.published.version

    def received(self, client: int, pruning_mask: Mask | None, version: int | None = None) -> None:
        """Note that a client answered a task to train or to evaluate: it holds the task's mask and published model.

        `version` is that of the model; None = the last one.
        """
        self.answered(client, pruning_mask)
        if self.published is not None:
            self.published.learned(client, self.version if version is None else version)

    def answered(self, client: int, pruning_mask: Mask | None) -> None:
        """Note that a client answered a query under a mask; a query carries no published model."""
        self.client_masks.learned(client, pruning_mask)

    def forget(self, client: int) -> None:
        """Note that a client failed: mask, model and frozen weights are sent to it again."""
        self.client_masks.forget(client)
        if self.published is not None:
            self.published.forget(client)

    def restore(self, saved: ServerSnapshot) -> None:
        """Restore what clients hold from a snapshot."""
        self.client_masks = ClientMasks()
        for client in saved.answered:
            self.client_masks.learned(client, saved.held_masks.get(client))
        self.codec_state.tensors = saved.codec_state
        if self.published is not None:
            self.published.restore(saved.published, saved.client_versions)
