"""What server and clients build alike from an experiment: data, partitions, the seeded model, the exchange."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import cast

import numpy as np
import torch
from flwr.clientapp import ClientApp
from torch import nn

from fl_sim import codecs, models, precision, wire
from fl_sim.config import Experiment
from fl_sim.data import CropFlip, Data, Split, label_counts
from fl_sim.data import load as load_data
from fl_sim.data import partition as make_partition
from fl_sim.gating import Gated, Gating, keeping
from fl_sim.runtime.app import ClientHost, client_app
from fl_sim.seeding import Purpose, derive, generator
from fl_sim.training import snapshot
from fl_sim.types import Client, FlatParams, UserError

AUGMENT = {"none": None, "crop_flip": CropFlip()}


@dataclass(frozen=True)
class Federation:
    """What server and clients build alike from the experiment: data, partitions, the seeded model, the exchange."""

    experiment: Experiment
    data: Data
    parts: list[np.ndarray]
    model: nn.Module
    initial: FlatParams
    exchange: wire.Exchange
    gating: Gating | None = None

    @classmethod
    def build(cls, experiment: Experiment) -> Federation:
        """Load data, partition it, and make the seeded model.

        Raises:
            UserError: data missing, partition impossible, model unknown.
        """
        torch.set_num_threads(1)
        section = experiment.data
        data = load_data(section.source, validation=section.validation, proxy=section.proxy)
        parts = make_partition(
            data.train.labels.numpy(),
            section.clients,
            kind=section.partition,
            alpha=section.alpha,
            shards=section.shards,
            min_size=section.min_size,
            seed=experiment.seed,
        )
        channels, height, _ = data.shape
        model = models.build(
            experiment.model.name,
            num_classes=data.num_classes,
            in_channels=channels,
            image_size=height,
            width=experiment.model.width,
            seed=experiment.seed,
        )
        gating = experiment.gating
        if gating is not None:
            model = gating.wrap(model, seed=derive(experiment.seed, Purpose.GATES))
            gating = gating.settled(model, data.shape)
            model.set_keep(gating.keep)
        params = snapshot(model)
        schema = codecs.Schema.of(params, models.prunable_names(model))
        options = experiment.wire
        exchange = wire.Exchange(schema, options.uplink, options.downlink, options.error_feedback)
        return cls(experiment, data, parts, model, schema.view(schema.flat(params)), exchange, gating)

    @property
    def label_counts(self) -> list[list[int]]:
        """Training samples of each client (row) by class (column)."""
        counts: list[list[int]] = label_counts(
            self.data.train.labels.numpy(), self.parts, self.data.num_classes
        ).tolist()
        return counts

    @property
    def device(self) -> torch.device:
        """Where models train."""
        name = self.experiment.device
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UserError(f"device = {name!r}: {error}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device = {name!r}: no CUDA device here; allowed: auto, cpu")
        return device

    @property
    def described(self) -> dict[str, object]:
        """The arguments of `fl_sim.models.build` that make this federation's model, initialisation aside, and its gates."""
        channels, height, _ = self.data.shape
        asked = self.experiment.model
        shape = {"num_classes": self.data.num_classes, "in_channels": channels, "image_size": height}
        gates = {} if self.gating is None else {"gating": asdict(self.gating)}
        return {"name": asked.name, "width": asked.width, **shape, **gates}

    def proxy(self) -> Split | None:
        """Images that the server holds: a share of the training set, or noise; None unless the config asks for them."""
        count = self.experiment.data.noise
        rng = generator(self.experiment.seed, Purpose.DATA)
        held = self.data.train.noise(count, rng) if count else self.data.proxy
        return None if held is None else held.to(self.device)

    def as_in(self, number: int) -> AbstractContextManager[object]:
        """The model as the plan has it in this round: a gated one keeps that round's share of its channels."""
        if self.gating is None or not isinstance(self.model, Gated):
            return nullcontext()
        return keeping(self.model, self.gating.at(number))

    def client(self) -> Client:
        """The client that the config names.

        Raises:
            UserError: no such client, or not with these options.
        """
        return cast(Client, self.experiment.client.build({"training": self.experiment.training, "gating": self.gating}))

    def host(self) -> ClientHost:
        """The resident client side of one process."""
        experiment = self.experiment
        augment = AUGMENT[experiment.data.augment]
        device = self.device

        @cache
        def split_of(partition: int) -> Split:
            return self.data.train.subset(self.parts[partition]).augmented(augment).to(device)

        return ClientHost(self.client(), self.model.to(device), split_of, self.exchange, self.initial)


def make_client_app(experiment: Experiment) -> ClientApp:
    """The Flower ClientApp of an experiment; its host is built now, so that no client's time contains it."""
    host = Federation.build(experiment).host()
    return client_app(lambda context: host)


def resolved(experiment: Experiment, federation: Federation) -> Experiment:
    """Settle what depends on the machine once, so that every worker computes the same numbers."""
    if experiment.training.precision != "auto":
        return experiment
    chosen = precision.choose(
        federation.model, federation.data.shape, experiment.training.batch_size, federation.device
    )
    return experiment.model_copy(update={"training": replace(experiment.training, precision=chosen)})
