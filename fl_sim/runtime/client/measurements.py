"""What a client measures of a received model without training it: its metrics, distortion curves, gradient, loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from torch import nn

from fl_sim.codecs import CorruptPayload
from fl_sim.communication import gradient_query, loss_query
from fl_sim.communication import messages as wire
from fl_sim.communication.messages import PARTITION
from fl_sim.communication.task_header import CurveRequest, GradientRequest
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Task
from fl_sim.data import Split
from fl_sim.models.parameters import load, unit_singular_vectors
from fl_sim.runtime.client.isolation import LentData
from fl_sim.runtime.client.node_state import PERSONAL, STATE, kept_tensors
from fl_sim.runtime.client.over_fitting import Settle
from fl_sim.runtime.client.receiver import Receiver
from fl_sim.sparsity import curve_messages as measuring
from fl_sim.sparsity.curve_cache import cached_curves
from fl_sim.sparsity.curves import MeasureCurves, calibration
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.evaluation import evaluate
from fl_sim.training.gradients import mean_gradient
from fl_sim.training.tasks import LearningTask


@dataclass(frozen=True)
class Measurements:
    """Answers to a server that asks a client to measure, not to train; nothing of it is kept.

    Attributes:
        client: the user's client.
        model: of this process, on its device.
        split_of: partition -> that client's training data.
        test_of: partition -> test samples of that client's kind.
        receiver: reads the messages.
        lent: data as they are lent to clients.
        settle: gives a received model BatchNorm statistics, where none travel and clients keep none.
        learning: the loss and the metrics.
    """

    client: Client
    model: nn.Module
    split_of: Callable[[int], Split]
    test_of: Callable[[int], Split]
    receiver: Receiver
    lent: LentData
    settle: Settle
    learning: LearningTask

    def evaluate(self, message: Message, context: Context) -> Message:
        """Evaluate the received model, with this client's personal entries, on test samples of this client's kind.

        A client with `before_evaluation` makes the model its own first; of that nothing is kept.
        """
        task = self.receiver.receive(message, context)
        data = self.test_of(partition := int(context.node_config[PARTITION]))
        personalise = getattr(self.client, "before_evaluation", None)
        self.receiver.resident.place(kept_tensors(context, PERSONAL))
        unit_singular_vectors(load(self.model, task.params))
        with unchanged_settings(), seeded(_seed(task, partition)):
            if personalise is not None:
                personalise(task, self._for_evaluation(task, partition, context))
            metrics = evaluate(self.model, data, self.learning)
        if personalise is not None:
            self.receiver.resident.leave()  # raises where frozen weights were changed
        record = MetricRecord({**metrics, wire.NUM_EXAMPLES: len(data)})
        return Message(RecordDict({wire.METRICS: record}), reply_to=message)

    def _for_evaluation(self, task: Task, partition: int, context: Context) -> ClientContext:
        """The context of a client that makes a received model its own; its changes to `state` are dropped."""
        self.receiver.resident.isolation.needed = self.receiver.resident.isolation.used = (
            True  # the next client gets the model as built
        )
        seed = _seed(task, partition)
        return ClientContext(
            self.model,
            self.lent.lend(self.split_of(partition)).data,
            torch.Generator().manual_seed(seed),
            kept_tensors(context, STATE),
            seed,
            loss=self.learning,
            personal=self.receiver.exchange.personal,
        )

    def curves(self, message: Message, context: Context) -> Message:
        """Measure distortion curves of the received model on a fixed part of this client's data."""
        task = self.receiver.receive(message, context)
        request = wire.read_header(message.content).request
        if not isinstance(request, CurveRequest):
            raise CorruptPayload("a query for distortion curves whose header asks for none")
        measure = MeasureCurves(request.levels, request.summary, request.batch_size)
        own = self.split_of(partition := int(context.node_config[PARTITION]))
        images = calibration(own, request.images)
        self.receiver.resident.place(kept_tensors(context, PERSONAL))
        model = unit_singular_vectors(load(self.model, task.params))
        with unchanged_settings(), seeded(_seed(task, partition)):
            self.settle(model, own)
            measured = cached_curves(measure, model, images, self.receiver.exchange.schema.prunable)
        answer = wire.content(measuring.encode_curves(measured), metrics={wire.NUM_EXAMPLES: len(images)})
        return Message(answer, reply_to=message)

    def gradients(self, message: Message, context: Context) -> Message:
        """Measure the gradient of the received model's loss on this client's training samples, not augmented."""
        task = self.receiver.receive(message, context)
        request = wire.read_header(message.content).request
        if not isinstance(request, GradientRequest):
            raise CorruptPayload("a query for gradients whose header asks for none")
        own = self.split_of(partition := int(context.node_config[PARTITION]))
        self.receiver.resident.place(kept_tensors(context, PERSONAL))
        model, schema = (
            unit_singular_vectors(load(self.model, task.params)),
            self.receiver.exchange.schema.prunable_part,
        )
        with unchanged_settings(), seeded(_seed(task, partition)):
            measured = mean_gradient(model, own, self.learning, schema.names)
        data = gradient_query.encode_gradients(measured, request.share, task.mask, schema)
        return Message(wire.content(data, metrics={wire.NUM_EXAMPLES: len(own)}), reply_to=message)

    def losses(self, message: Message, context: Context) -> Message:
        """Measure the mean loss of the received model on this client's training samples, not augmented."""
        task = self.receiver.receive(message, context)
        own = self.split_of(partition := int(context.node_config[PARTITION])).augmented(None)
        self.receiver.resident.place(kept_tensors(context, PERSONAL))
        model = unit_singular_vectors(load(self.model, task.params))
        with unchanged_settings(), seeded(_seed(task, partition)):
            self.settle(model, own)
            measured = evaluate(model, own, self.learning)
        answer = wire.content(loss_query.encode_loss(measured["loss"]), metrics={wire.NUM_EXAMPLES: len(own)})
        return Message(answer, reply_to=message)


def _seed(task: Task, partition: int) -> int:
    """What a client's global generators start from where it measures."""
    return derive(task.seed, task.round, partition, Purpose.EVALUATION)
