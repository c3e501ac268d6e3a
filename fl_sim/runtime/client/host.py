"""The ClientApp: receives a task, runs the client, answers with an encoded update.

One `ClientHost` lives in each process and keeps model, data and the last decoded task resident, whatever runtime calls
it. A client never sees Flower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_sim.communication import gradient_query, loss_query
from fl_sim.communication import messages as wire
from fl_sim.communication.error_feedback import ErrorFeedback
from fl_sim.communication.exchange import Exchange, OwnCoding
from fl_sim.communication.flower_private import reply_to
from fl_sim.communication.messages import PARTITION
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Params, Task, Update
from fl_sim.data import Split
from fl_sim.models.module_state import ModuleState
from fl_sim.models.parameters import entries, load
from fl_sim.runtime.client.fixed_weights import Resident
from fl_sim.runtime.client.isolation import LentContext, LentData, Loan, Received
from fl_sim.runtime.client.kept_between_calls import CLIENT, CODEC, Watch
from fl_sim.runtime.client.measurements import Measurements
from fl_sim.runtime.client.node_state import CODEC_STATE, PERSONAL, RESIDUAL, STATE, keep, kept_tensors
from fl_sim.runtime.client.over_fitting import MeasureFit, Settle, keep_statistics, no_measurement
from fl_sim.runtime.client.receiver import Receiver
from fl_sim.runtime.client.update_validation import BadUpdate as BadUpdate
from fl_sim.runtime.client.update_validation import checked, kept
from fl_sim.runtime.client.uploads import NOTHING, Made
from fl_sim.runtime.worlds import World
from fl_sim.sparsity import curve_messages as measuring
from fl_sim.training.client import Client, ClientContext, as_they_are
from fl_sim.training.tasks import CLASSIFICATION, LearningTask

log = logging.getLogger("fl_sim")


@dataclass(frozen=True)
class ClientTask:
    """A task that was read: what the client is given, what of that others share, the entries it keeps for itself, and its
    error feedback if there is."""

    task: Task
    ctx: ClientContext
    personal: Params
    received: Received
    loan: Loan
    feedback: ErrorFeedback | None = None


@dataclass
class ClientHost:
    """Resident client side of one process: model, data and the last decoded task.

    Attributes:
        client: the user's client.
        model: resident model, on its device; its parameters are overwritten for every client.
        split_of: partition -> that client's training data, resident after the first call.
        test_of: partition -> test samples of that client's kind: of its groups, or in the proportions of its labels.
        exchange: what travels and how.
        reference: the first global parameters, which every party can make by itself; differences start from them.
        rebuild: seed -> the entries that never travel.
        measure: what is measured of a trained model, for the log.
        settle: gives a received model BatchNorm statistics, where none travel and clients keep none.
        built: the model before anybody used it; None = as it is now.
        world: hashes of what this process has built, for servers that ask.
        learning: what the federation learns: the loss and the metrics.
    """

    client: Client
    model: nn.Module
    split_of: Callable[[int], Split]
    test_of: Callable[[int], Split]
    exchange: Exchange
    reference: Params
    rebuild: Callable[[int], Params]
    measure: MeasureFit = no_measurement
    settle: Settle = keep_statistics
    built: ModuleState | None = None
    world: World = field(default_factory=dict)
    learning: LearningTask = CLASSIFICATION

    def __post_init__(self) -> None:
        self._resident = Resident(self.model, self.exchange, self.rebuild, self.built)
        self._lent = LentData()
        self._receiver = Receiver(self.exchange, self.reference, self._resident)
        self.measurements = Measurements(
            self.client,
            self.model,
            self.split_of,
            self.test_of,
            self._receiver,
            self._lent,
            self.settle,
            self.learning,
        )
        uplink = self.exchange.uplink
        watches = {
            CLIENT: Watch.of(self.client, self.model),
            CODEC: Watch.of(uplink.codec, role=CODEC) if isinstance(uplink, OwnCoding) else None,
        }
        self._watches = {role: watch for role, watch in watches.items() if watch is not None}

    def train(self, message: Message, context: Context) -> Message:
        """Handle one training task."""
        return self.finish(self.begin(message, context), self.client, message, context)

    def begin(self, message: Message, context: Context) -> ClientTask:
        """Read a training task: everything that the client will be given."""
        task = self._receiver.receive(message, context)
        partition = int(context.node_config[PARTITION])
        seed = derive(task.seed, task.round, partition, Purpose.CLIENT)
        shared, loan = self._receiver.last, self._lent.lend(self.split_of(partition))
        feedback = self._feedback(task, context)
        ctx = LentContext(
            model=self.model,
            data=loan.data,
            rng=torch.Generator().manual_seed(seed),
            state=kept_tensors(context, STATE),
            seed=seed,
            corrected=as_they_are if feedback is None else feedback.corrected,
            loss=self.learning,
            personal=self.exchange.personal,
            client=partition,
            peer=self.split_of,
            use=self._resident.isolation.use,
        )
        return ClientTask(task, ctx, kept_tensors(context, PERSONAL), shared, loan, feedback)

    def _feedback(self, task: Task, context: Context) -> ErrorFeedback | None:
        if not self.exchange.error_feedback:
            return None
        return ErrorFeedback(self.exchange, task, kept_tensors(context, RESIDUAL).get(RESIDUAL))

    def start(self, client_task: ClientTask) -> Params:
        """Copies of the entries that training changes, as this client's finds them, on the model's device."""
        self._resident.isolation.needed = self._resident.isolation.used = True
        self._resident.enter(client_task.personal)
        own = entries(load(self.model, client_task.task.params))
        changing = {n: v for n, v in own.items() if v.requires_grad or not isinstance(v, nn.Parameter)}
        return {name: value.detach().clone() for name, value in changing.items()}

    def finish(self, client_task: ClientTask, client: Client, message: Message, context: Context) -> Message:
        """Run a client on its task, check and encode what it returns."""
        task, ctx = client_task.task, client_task.ctx
        self._resident.enter(client_task.personal)
        update = self._resident.isolation.call(client, task, ctx)
        self._look_at_what_is_kept(CLIENT)
        self._require_untouched(client_task)
        fit = self.measure(task.round, int(context.node_config[PARTITION]), self.model)
        personal = self._resident.leave()
        if self._receiver.is_large:
            self.model.zero_grad(set_to_none=True)
        return self._answer(client_task, update, personal, fit, message, context)

    @property
    def needs_no_model_after_training(self) -> bool:
        """Whether a trained client is left with nothing but its parameters: no measurement, no entry of its own, no extra
        tensors. Then `answer` does, and the model need not be made the client's."""
        return self.measure is no_measurement and not self.exchange.personal and not self.exchange.extra.up

    def answer(
        self, client_task: ClientTask, update: Update, message: Message, context: Context, made: Made = NOTHING
    ) -> Message:
        """Encode the update of a client that was trained elsewhere, on a host that needs no model after training; `made` is
        what was made of it together with others."""
        return self._answer(client_task, update, {}, {}, message, context, made)

    def _answer(
        self,
        client_task: ClientTask,
        update: Update,
        personal: Params,
        fit: Mapping[str, float],
        message: Message,
        context: Context,
        made: Made = NOTHING,
    ) -> Message:
        """Check and encode an update, and keep what the client keeps."""
        task, ctx = client_task.task, client_task.ctx
        update = checked(update, self.exchange.schema, self._known, self.exchange.extra.up)
        state = kept(ctx.state)
        codec_state = kept_tensors(context, CODEC_STATE)
        encoded, left_out = self._encoded(client_task, update, codec_state, made)
        self._look_at_what_is_kept(CODEC)
        codec_state = kept(codec_state, "the codec's state")
        extra = self.exchange.encode_extra_up(update, task, seed=ctx.seed) if update.extra else {}
        keep(context, STATE, state)
        keep(context, PERSONAL, personal)
        keep(context, RESIDUAL, left_out)
        keep(context, CODEC_STATE, codec_state)
        answer = update if not fit else replace(update, metrics={**update.metrics, **fit})
        return reply_to(message, wire.update_content(answer, encoded, extra))

    def _look_at_what_is_kept(self, role: str) -> None:
        """Say once in a process that the client, or the codec, keeps something outside of what is saved and sent."""
        watch = self._watches.get(role)
        if watch is not None:
            if said := watch.called():
                log.warning("%s: %s", role, said)
            if watch.done:
                del self._watches[role]

    def _known(self) -> Collection[str]:
        return self.model.state_dict().keys()

    def _encoded(
        self, client_task: ClientTask, update: Update, codec_state: dict[str, Tensor], made: Made
    ) -> tuple[bytes, dict[str, Tensor]]:
        """The payload of an update, and the residual of error feedback, which adds what it left out before."""
        feedback, encoded = client_task.feedback, made.payload
        if encoded is None:
            if made.sent is not None:
                sent = replace(update, params=made.sent)
            else:
                sent = update if feedback is None else feedback.encoded(update)
            encoded = self.exchange.encode_up(sent, client_task.task, seed=client_task.ctx.seed, state=codec_state)
        if feedback is None:
            return encoded, {}
        return encoded, {RESIDUAL: feedback.left_out(update, encoded) if made.left_out is None else made.left_out}

    def _require_untouched(self, client_task: ClientTask) -> None:
        """Complain of a client that wrote into what it shares with others; the next one gets a fresh copy of the task."""
        if client_task.received.changed:
            self._receiver.forget()
            self._resident.isolation.needed = True
            raise BadUpdate(
                "the client changed task.params or task.mask in place; change a copy: dict(task.params), value.clone()"
            )
        if client_task.loan.changed:
            self._resident.isolation.needed = True
            raise BadUpdate("a client changed the samples of ctx.data in place; change a copy: images.clone()")

    def query(self, message: Message, context: Context) -> Message:
        """Tell which partition this node holds, as foreign runtimes number their nodes at random, and what it has built."""
        answer = ConfigRecord({PARTITION: int(context.node_config[PARTITION]), **self.world})
        return Message(RecordDict({wire.CONFIG: answer}), reply_to=message)


def client_app(host: Callable[[Context], ClientHost]) -> ClientApp:
    """The Flower app over a host; `host` is asked at every message, so that a runtime may build it late and keep it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return host(context).train(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return host(context).measurements.evaluate(message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return host(context).query(message, context)

    @app.query(measuring.ACTION)
    def curves(message: Message, context: Context) -> Message:
        return host(context).measurements.curves(message, context)

    @app.query(gradient_query.ACTION)
    def gradients(message: Message, context: Context) -> Message:
        return host(context).measurements.gradients(message, context)

    @app.query(loss_query.ACTION)
    def losses(message: Message, context: Context) -> Message:
        return host(context).measurements.losses(message, context)

    return app
