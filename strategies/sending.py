"""The way down: one payload for each distinct thing that a client holds, and what the server knows of who holds what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from flwr.app import Message, MessageType, RecordDict

from fl_sim import codecs
from fl_sim.codecs import Description
from fl_sim.communication import messages as wire
from fl_sim.communication.flower_traffic import Form
from fl_sim.communication.sparse_broadcast import Parcel
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Mask, Params, Task
from fl_sim.runtime.server_context import ServerSnapshot, Setup
from strategies.books import Books
from strategies.cohorts import Cohort
from strategies.downlink import Downlink
from strategies.held_masks import Holdings
from strategies.published_model import Published
from strategies.round_log import RoundLog

PHASES = {MessageType.TRAIN: "train", MessageType.EVALUATE: "evaluate"}


class Sender:
    """Encodes tasks, and books them once they are on their way; `holdings` and `published` say what each client holds."""

    def __init__(self, setup: Setup, downlink: Downlink) -> None:
        self.setup, self.downlink, self.exchange = setup, downlink, setup.exchange
        self.books = Books(setup)
        self.holdings = Holdings()
        self._unbooked: list[Callable[[], None]] = []
        first = setup.exchange.schema.flat(setup.initial)
        rule = setup.broadcast
        self.published = None if rule is None else Published(rule, setup.exchange, setup.seed, first)

    # -- messages ------------------------------------------------------------------------------------------------------

    def messages(self, task: Task, cohort: Cohort, kind: str, log: RoundLog) -> list[Message]:
        """One message per client of the cohort; clients that hold the same share one payload. `log` takes the bytes.

        `sent` books them, when workers have them: booked before, they would keep every worker waiting.
        """
        prepared: dict[tuple[int, wire.Frozen | None], tuple[RecordDict, Description, Form]] = {}
        schema, parcel_for = self.exchange.schema, self._parcels(task, kind)
        messages = []
        for client, node in cohort:
            held = self.holdings.held(client) if task.mask is not None else None
            frozen = None if self.holdings.has_frozen(client) else self.exchange.frozen
            parcel = parcel_for(client, held)
            key = id(parcel), frozen
            if key not in prepared:
                described = parcel.described(schema, held)
                if frozen is not None:
                    described = described.with_auxiliary(len(frozen.encode()))
                told = replace(task, config={**task.config, **(parcel.told if parcel.version >= 0 else {})})
                content = wire.task_content(told, bytes(parcel.data), seed=self.setup.seed, frozen=frozen)
                prepared[key] = content, described, Form.of(content)
            content, described, form = prepared[key]
            messages.append(Message(content, node, kind, group_id=str(task.round)))
            log.down_bytes[client] = sum(described.sections.values())
            book = partial(self._book, kind, task.round, client, messages[-1], described, form, parcel.mask)
            self._unbooked.append(book)
        return messages

    def sent(self) -> None:
        """The messages made since the last call are on their way: book them."""
        unbooked, self._unbooked = self._unbooked, []
        for book in unbooked:
            book()

    def _book(
        self,
        kind: str,
        number: int,
        client: int,
        message: Message,
        described: Description,
        form: Form,
        mask: Mask | None,
    ) -> None:
        self.books.book("down", number, client, message, described, phase=PHASES.get(kind, "query"), form=form)
        if kind == MessageType.TRAIN:
            self.books.record("down", number, client, described, mask)

    def _parcels(self, task: Task, kind: str) -> Callable[[int, Mask | None], Parcel]:
        """(client, mask that it holds) -> what it is sent; equal parcels are one object."""
        if self.published is not None and kind in PHASES:
            behind = task.round - 1 if kind == MessageType.TRAIN else task.round
            self.published.publish(behind, task.params, task.mask)
            return self.published.parcel
        seed = derive(self.setup.seed, task.round, Purpose.ENCODING)
        types = self.downlink(self.setup, task, seed)
        made: dict[bytes, Parcel] = {}

        def parcel(client: int, held: Mask | None) -> Parcel:
            key = b"" if held is None else codecs.mask_hash(held)
            if key not in made:
                data = self.exchange.encode_down(task, self.setup.initial, held=held, seed=seed, types=types)
                made[key] = Parcel(data, -1, None, self.exchange.downlink, task.mask)
            return made[key]

        return parcel

    # -- a sparse broadcast --------------------------------------------------------------------------------------------

    def start(self, params: Params) -> Params:
        """The parameters that this round's clients start from; `params` are the global ones."""
        return params if self.published is None else self.published.params

    def with_owed(self, new: Params, before: Params) -> Params:
        """`new` plus what of `before`, the global parameters, was not published: it is still to come."""
        if self.published is None:
            return new
        schema = self.exchange.schema
        owed = schema.flat(before) - schema.flat(self.published.params)
        owed[schema.prunable_size :] = 0.0
        return schema.view(schema.flat(new) + owed)

    # -- who holds what ------------------------------------------------------------------------------------------------

    def received(self, client: int, mask: Mask | None) -> None:
        """The client answered a task to train or to evaluate, so it holds its mask and its model."""
        self.answered(client, mask)
        if self.published is not None:
            self.published.learned(client)

    def answered(self, client: int, mask: Mask | None) -> None:
        """The client answered a question under `mask`; a question carries no published model."""
        self.holdings.learned(client, mask)

    def forget(self, client: int) -> None:
        """The client failed: what it holds is unknown."""
        self.holdings.forget(client)
        if self.published is not None:
            self.published.forget(client)

    def restore(self, saved: ServerSnapshot) -> None:
        """Know what was known when `saved` was taken."""
        self.holdings = Holdings()
        for client in saved.answered:
            self.holdings.learned(client, saved.held.get(client))
        if self.published is not None:
            self.published.restore(saved.published, saved.holders)
