"""The ClientApp: receives a task, runs the client, answers with an encoded update.

One `ClientHost` lives in each process and keeps model, data and the last decoded task resident, whatever runtime calls
it. A client never sees Flower.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_sim.codecs import CorruptPayload
from fl_sim.communication import gradient_query, loss_query
from fl_sim.communication import messages as wire
from fl_sim.communication.error_feedback import ErrorFeedback
from fl_sim.communication.exchange import Exchange, Frozen, OwnCoding
from fl_sim.communication.flower_private import filled, reply_to
from fl_sim.communication.kept_arrays import array_from, values_of
from fl_sim.communication.messages import PARTITION
from fl_sim.communication.sparse_broadcast import received
from fl_sim.communication.task_header import BroadcastHeader, CurveRequest, GradientRequest
from fl_sim.core.large import is_large
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Params, Task, Update
from fl_sim.data import Split
from fl_sim.models.module_state import ModuleState
from fl_sim.models.parameters import entries, load, unit_singular_vectors
from fl_sim.runtime.client.fixed_weights import Resident
from fl_sim.runtime.client.isolation import LentContext, LentData, Loan, Received
from fl_sim.runtime.client.kept_between_calls import CLIENT, CODEC, Watch
from fl_sim.runtime.client.over_fitting import MeasureFit, Settle, keep_statistics, no_measurement
from fl_sim.runtime.client.update_validation import BadUpdate as BadUpdate
from fl_sim.runtime.client.update_validation import checked, kept
from fl_sim.runtime.worlds import World
from fl_sim.sparsity import curve_messages as measuring
from fl_sim.sparsity.curve_cache import cached_curves
from fl_sim.sparsity.curves import MeasureCurves, calibration
from fl_sim.training.client import Client, ClientContext, as_they_are
from fl_sim.training.evaluation import evaluate
from fl_sim.training.gradients import mean_gradient
from fl_sim.training.tasks import CLASSIFICATION, LearningTask

log = logging.getLogger("fl_sim")
STATE, MASK, FROZEN, PERSONAL = "fl_sim.state", "fl_sim.mask", "fl_sim.frozen", "fl_sim.personal"
RESIDUAL, CODEC_STATE = "fl_sim.residual", "fl_sim.codec"
MODEL, VERSION = "fl_sim.model", "version"


@dataclass(frozen=True)
class _Decoded:
    """The last payload that a process decoded: for which held mask, into what, and what its clients keep of it."""

    data: bytes | memoryview
    key: bytes
    received: Received
    kept: ArrayRecord | None = None


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
    _last: _Decoded | None = field(default=None, repr=False)
    _message: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._resident = Resident(self.model, self.exchange, self.rebuild, self.built)
        self._lent, self._is_large = LentData(), is_large(self.exchange.schema.nbytes)
        uplink = self.exchange.uplink
        watches = {
            CLIENT: Watch.of(self.client, self.model),
            CODEC: Watch.of(uplink.codec, role=CODEC) if isinstance(uplink, OwnCoding) else None,
        }
        self._watches = {role: watch for role, watch in watches.items() if watch is not None}

    def _receive(self, message: Message, context: Context) -> Task:
        """Decode a task; the bytes of one round are decoded once per process, not once per client."""
        if self.exchange.frozen is not None:
            self._receive_frozen(message, context)
        header = wire.read_header(message.content)
        data, config = wire.payload(message.content), wire.read_config(message.content)
        received = self._model(data, header.broadcast, context)
        if self._is_large:  # what was decoded lies in the message: it is not kept longer than the server keeps that
            self._message = weakref.ref(wire.array_records(message.content)[0][1], self._forget)
        if received.mask is not None:
            _keep(context, MASK, {MASK: wire.pack_mask(received.mask)})
        extra = self._extra(message, received) if message.metadata.message_type == MessageType.TRAIN else {}
        return Task(header.round, received.params, received.mask, config, header.seed, extra)

    def _forget(self, gone: object) -> None:
        """Forget what was decoded; called when its message is gone."""
        if gone is self._message:
            self._last = None

    def _extra(self, message: Message, received: Received) -> dict[str, Params]:
        """The extra tensors of a training task, this client's own copies."""
        extra = self.exchange.extra
        return extra.decode(extra.down, wire.extra_payloads(message.content), received.mask)

    def _receive_frozen(self, message: Message, context: Context) -> None:
        """Put the frozen weights in place that the message names, or that this client was told of earlier."""
        known_bytes = _tensors(context, FROZEN).get(FROZEN)
        known = None if known_bytes is None else Frozen.decode(known_bytes.numpy().tobytes())
        frozen = self._resident.receive(wire.frozen(message.content), known)
        if frozen != known:
            _keep(context, FROZEN, {FROZEN: torch.frombuffer(bytearray(frozen.encode()), dtype=torch.uint8)})

    def _model(self, data: bytes | memoryview, header: BroadcastHeader | None, context: Context) -> Received:
        """The parameters and the pruning mask that a payload stands for; a published model is kept by the client."""
        schema = self.exchange.schema
        packed = _tensors(context, MASK).get(MASK)
        key = b"" if packed is None else packed.numpy().tobytes()
        if self._last is None or self._last.data is not data or self._last.key != key:
            self._last = None  # its model is freed before the next one is decoded
            # Of a large model there is no copy to give: the server compares its broadcast's checksum after the round.
            copied = self._resident.isolation.needed and not self._is_large
            held_mask = None if packed is None else wire.unpack_mask(packed, schema)
            if header is None:
                decoded = self.exchange.decode_down(data, self.reference, held_mask=held_mask)
                self._last = _Decoded(data, key, Received.of(*decoded, copied=copied))
            else:
                model, mask = received(data, header, self._base(context, header), self.exchange, held_mask)
                kept = ArrayRecord({MODEL: Array(model.numpy()), VERSION: Array(np.array([header.version]))})
                self._last = _Decoded(data, key, Received.of(schema.view(model), mask, copied=copied), kept)
        last = self._last
        if last.kept is not None:
            # One record for all clients of this process that hold this model: it is replaced, never changed.
            context.state[MODEL] = last.kept
        return last.received

    def _base(self, context: Context, header: BroadcastHeader) -> Tensor | None:
        """The published model, flat, that a payload starts from: as this client holds it, or the seeded one; else None."""
        record = context.state.array_records.get(MODEL)
        if record is None:
            return self.exchange.schema.flat(self.reference) if header.start else None
        return torch.from_numpy(record[MODEL].numpy()) if int(record[VERSION].numpy()[0]) == header.base else None

    def train(self, message: Message, context: Context) -> Message:
        """Handle one training task."""
        return self.finish(self.begin(message, context), self.client, message, context)

    def begin(self, message: Message, context: Context) -> ClientTask:
        """Read a training task: everything that the client will be given."""
        task = self._receive(message, context)
        partition = int(context.node_config[PARTITION])
        seed = derive(task.seed, task.round, partition, Purpose.CLIENT)
        assert self._last is not None
        shared, loan = self._last.received, self._lent.lend(self.split_of(partition))
        feedback = self._feedback(task, context)
        ctx = LentContext(
            model=self.model,
            data=loan.data,
            rng=torch.Generator().manual_seed(seed),
            state=_tensors(context, STATE),
            seed=seed,
            corrected=as_they_are if feedback is None else feedback.corrected,
            loss=self.learning,
            personal=self.exchange.personal,
            client=partition,
            peer=self.split_of,
            use=self._resident.isolation.use,
        )
        return ClientTask(task, ctx, _tensors(context, PERSONAL), shared, loan, feedback)

    def _feedback(self, task: Task, context: Context) -> ErrorFeedback | None:
        if not self.exchange.error_feedback:
            return None
        return ErrorFeedback(self.exchange, task, _tensors(context, RESIDUAL).get(RESIDUAL))

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
        if self._is_large:
            self.model.zero_grad(set_to_none=True)
        return self._answer(client_task, update, personal, fit, message, context)

    @property
    def needs_no_model_after_training(self) -> bool:
        """Whether a trained client is left with nothing but its parameters: no measurement, no entry of its own, no extra
        tensors. Then `answer` does, and the model need not be made the client's."""
        return self.measure is no_measurement and not self.exchange.personal and not self.exchange.extra.up

    def answer(self, client_task: ClientTask, update: Update, message: Message, context: Context) -> Message:
        """Encode the update of a client that was trained elsewhere, on a host that needs no model after training."""
        return self._answer(client_task, update, {}, {}, message, context)

    def _answer(
        self,
        client_task: ClientTask,
        update: Update,
        personal: Params,
        fit: Mapping[str, float],
        message: Message,
        context: Context,
    ) -> Message:
        """Check and encode an update, and keep what the client keeps."""
        task, ctx = client_task.task, client_task.ctx
        update = checked(update, self.exchange.schema, self._known, self.exchange.extra.up)
        state = kept(ctx.state)
        codec_state = _tensors(context, CODEC_STATE)
        encoded, left_out = self._encoded(client_task, update, codec_state)
        self._look_at_what_is_kept(CODEC)
        codec_state = kept(codec_state, "the codec's state")
        extra = self.exchange.encode_extra_up(update, task, seed=ctx.seed) if update.extra else {}
        _keep(context, STATE, state)
        _keep(context, PERSONAL, personal)
        _keep(context, RESIDUAL, left_out)
        _keep(context, CODEC_STATE, codec_state)
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
        self, client_task: ClientTask, update: Update, codec_state: dict[str, Tensor]
    ) -> tuple[bytes, dict[str, Tensor]]:
        """The payload of an update, and the residual of error feedback, which adds what it left out before."""
        task, seed = client_task.task, client_task.ctx.seed
        if client_task.feedback is None:
            return self.exchange.encode_up(update, task, seed=seed, state=codec_state), {}
        encoded = self.exchange.encode_up(client_task.feedback.encoded(update), task, seed=seed, state=codec_state)
        return encoded, {RESIDUAL: client_task.feedback.left_out(update, encoded)}

    def _require_untouched(self, client_task: ClientTask) -> None:
        """Complain of a client that wrote into what it shares with others; the next one gets a fresh copy of the task."""
        if client_task.received.changed:
            self._last, self._resident.isolation.needed = None, True
            raise BadUpdate(
                "the client changed task.params or task.mask in place; change a copy: dict(task.params), value.clone()"
            )
        if client_task.loan.changed:
            self._resident.isolation.needed = True
            raise BadUpdate("a client changed the samples of ctx.data in place; change a copy: images.clone()")

    def evaluate(self, message: Message, context: Context) -> Message:
        """Evaluate the received model, with this client's personal entries, on test samples of this client's kind.

        A client with `before_evaluation` makes the model its own first; of that nothing is kept.
        """
        task = self._receive(message, context)
        data = self.test_of(partition := int(context.node_config[PARTITION]))
        personalise = getattr(self.client, "before_evaluation", None)
        self._resident.place(_tensors(context, PERSONAL))
        unit_singular_vectors(load(self.model, task.params))
        with unchanged_settings(), seeded(_seed(task, partition)):
            if personalise is not None:
                personalise(task, self._for_evaluation(task, partition, context))
            metrics = evaluate(self.model, data, self.learning)
        if personalise is not None:
            self._resident.leave()  # raises where frozen weights were changed
        record = MetricRecord({**metrics, wire.NUM_EXAMPLES: len(data)})
        return Message(RecordDict({wire.METRICS: record}), reply_to=message)

    def _for_evaluation(self, task: Task, partition: int, context: Context) -> ClientContext:
        """The context of a client that makes a received model its own; its changes to `state` are dropped."""
        self._resident.isolation.needed = self._resident.isolation.used = (
            True  # the next client gets the model as built
        )
        seed = _seed(task, partition)
        return ClientContext(
            self.model,
            self._lent.lend(self.split_of(partition)).data,
            torch.Generator().manual_seed(seed),
            _tensors(context, STATE),
            seed,
            loss=self.learning,
            personal=self.exchange.personal,
        )

    def curves(self, message: Message, context: Context) -> Message:
        """Measure distortion curves of the received model on a fixed part of this client's data."""
        task = self._receive(message, context)
        request = wire.read_header(message.content).request
        if not isinstance(request, CurveRequest):
            raise CorruptPayload("a query for distortion curves whose header asks for none")
        measure = MeasureCurves(request.levels, request.summary, request.batch_size)
        own = self.split_of(partition := int(context.node_config[PARTITION]))
        images = calibration(own, request.images)
        self._resident.place(_tensors(context, PERSONAL))
        model = unit_singular_vectors(load(self.model, task.params))
        with unchanged_settings(), seeded(_seed(task, partition)):
            self.settle(model, own)
            measured = cached_curves(measure, model, images, self.exchange.schema.prunable)
        answer = wire.content(measuring.encode_curves(measured), metrics={wire.NUM_EXAMPLES: len(images)})
        return Message(answer, reply_to=message)

    def gradients(self, message: Message, context: Context) -> Message:
        """Measure the gradient of the received model's loss on this client's training samples, not augmented."""
        task = self._receive(message, context)
        request = wire.read_header(message.content).request
        if not isinstance(request, GradientRequest):
            raise CorruptPayload("a query for gradients whose header asks for none")
        own = self.split_of(partition := int(context.node_config[PARTITION]))
        self._resident.place(_tensors(context, PERSONAL))
        model, schema = unit_singular_vectors(load(self.model, task.params)), self.exchange.schema.prunable_part
        with unchanged_settings(), seeded(_seed(task, partition)):
            measured = mean_gradient(model, own, self.learning, schema.names)
        data = gradient_query.encode_gradients(measured, request.share, task.mask, schema)
        return Message(wire.content(data, metrics={wire.NUM_EXAMPLES: len(own)}), reply_to=message)

    def losses(self, message: Message, context: Context) -> Message:
        """Measure the mean loss of the received model on this client's training samples, not augmented."""
        task = self._receive(message, context)
        own = self.split_of(partition := int(context.node_config[PARTITION])).augmented(None)
        self._resident.place(_tensors(context, PERSONAL))
        model = unit_singular_vectors(load(self.model, task.params))
        with unchanged_settings(), seeded(_seed(task, partition)):
            self.settle(model, own)
            measured = evaluate(model, own, self.learning)
        answer = wire.content(loss_query.encode_loss(measured["loss"]), metrics={wire.NUM_EXAMPLES: len(own)})
        return Message(answer, reply_to=message)

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
        return host(context).evaluate(message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return host(context).query(message, context)

    @app.query(measuring.ACTION)
    def curves(message: Message, context: Context) -> Message:
        return host(context).curves(message, context)

    @app.query(gradient_query.ACTION)
    def gradients(message: Message, context: Context) -> Message:
        return host(context).gradients(message, context)

    @app.query(loss_query.ACTION)
    def losses(message: Message, context: Context) -> Message:
        return host(context).losses(message, context)

    return app


def _seed(task: Task, partition: int) -> int:
    """What a client's global generators start from where it measures."""
    return derive(task.seed, task.round, partition, Purpose.EVALUATION)


def _tensors(context: Context, key: str) -> dict[str, Tensor]:
    """A client's kept tensors under `key`; fresh copies."""
    if not len(context.state) or key not in context.state:  # the rule; Flower's `get` raises and catches
        return {}
    record = context.state[key]
    items = record.items() if isinstance(record, ArrayRecord) else ()
    return {name: torch.from_numpy(values_of(array)) for name, array in items}


def _keep(context: Context, key: str, tensors: dict[str, Tensor]) -> None:
    """Keep tensors in the node's state, which every Flower runtime carries from round to round."""
    if tensors or key in context.state:
        arrays: dict[str, object] = {name: array_from(value.detach().cpu().numpy()) for name, value in tensors.items()}
        context.state[key] = filled(ArrayRecord, arrays)
