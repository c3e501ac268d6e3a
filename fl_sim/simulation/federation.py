"""What server and clients build alike from an experiment: data, partitions, the seeded model, the exchange."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import nn

from fl_sim import codecs, models
from fl_sim.communication import messages as wire
from fl_sim.communication.messages import PARTITION
from fl_sim.config.experiment import Experiment
from fl_sim.core.seeding import Purpose, derive, generator, numpy_generator
from fl_sim.core.types import FlatParams, Params, UserError
from fl_sim.data import CropFlip, Data, Split, label_counts, matching
from fl_sim.data import load as load_data
from fl_sim.data import partition as make_partition
from fl_sim.gating import Gated, Gating, keeping
from fl_sim.models.parameters import load, snapshot
from fl_sim.runtime.client.host import ClientHost, client_app
from fl_sim.runtime.client.over_fitting import MeasureFit, OwnFit, Settle, as_trained, unmeasured
from fl_sim.simulation import capacity_groups as capacities
from fl_sim.training import precision
from fl_sim.training.client import Client
from fl_sim.training.loop import OPTIMIZERS
from fl_sim.training.model_file import entries_for, read
from fl_sim.training.recalibration import recalibrate

AUGMENT = {"none": None, "crop_flip": CropFlip()}
TEST_SIZE = 500
"""Test samples on which one client evaluates."""


@dataclass(frozen=True)
class Federation:
    """What server and clients build alike from the experiment: data, partitions, the seeded model, the exchange.

    `initial` is what every party can make from the seed; `start`, the server's first parameters, differs from it where
    the experiment starts from given weights.
    """

    experiment: Experiment
    data: Data
    parts: list[np.ndarray]
    model: nn.Module
    initial: FlatParams
    start: FlatParams
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
        if not len(data.validation) or not len(data.test):
            sizes = f"{len(data.validation)} for validation, {len(data.test)} for test"
            raise UserError(f"data.validation = {section.validation:g} of {section.source!r}: {sizes}; needed: some")
        parts = make_partition(
            data.train.labels.numpy(),
            section.clients,
            kind=section.partition,
            alpha=section.alpha,
            shards=section.shards,
            min_size=section.min_size,
            seed=experiment.seed,
        )
        return cls._of(experiment, data, parts)

    @classmethod
    def _of(cls, experiment: Experiment, data: Data, parts: list[np.ndarray]) -> Federation:
        model, gating = make_model(experiment, data, experiment.seed)
        exchange = make_exchange(experiment, model)
        schema = exchange.schema
        initial = schema.view(schema.flat(snapshot(model)))
        given = given_weights(experiment, model)
        start = schema.view(schema.flat({**initial, **{n: p for n, p in given.items() if n in initial}}))
        return cls(experiment, data, parts, model, initial, start, exchange, gating)

    def others(self) -> list[Federation]:
        """The same with the models of the other capacities, in the order of the config."""
        return [self._of(other, self.data, self.parts) for other in capacities.variants(self.experiment)[1:]]

    @property
    def label_counts(self) -> list[list[int]]:
        """Training samples of each client (row) by class (column)."""
        counts: list[list[int]] = label_counts(
            self.data.train.labels.numpy(), self.parts, self.data.num_classes
        ).tolist()
        return counts

    @property
    def sizes(self) -> list[int]:
        """Training samples of each client."""
        return [len(part) for part in self.parts]

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
        train = self.data.train.augmented(AUGMENT[experiment.data.augment])
        device = self.device

        @cache
        def split_of(partition: int) -> Split:
            return train.subset(self.parts[partition]).to(device)

        @cache
        def test_of(partition: int) -> Split:
            kind = self.data.train.labels.numpy()[self.parts[partition]]
            rng = numpy_generator(experiment.seed, partition, Purpose.EVALUATION)
            test = self.data.test
            return test.subset(matching(test.labels.numpy(), kind, size=TEST_SIZE, rng=rng)).to(device)

        @cache
        def rebuild(seed: int) -> Params:
            return untravelled(make_model(experiment, self.data, seed)[0], self.exchange)

        return ClientHost(
            self.client(),
            self.model.to(device),
            split_of,
            test_of,
            self.exchange,
            self.initial,
            rebuild,
            self._measure(split_of, test_of),
            self._settle,
        )

    @property
    def _settle(self) -> Settle:
        """What gives a model statistics on a client, where it has none of its own."""
        if self.experiment.model.statistics != "recalibrate":
            return as_trained
        return partial(recalibrate, precision=self.experiment.training.precision)

    def _measure(self, split_of: Callable[[int], Split], test_of: Callable[[int], Split]) -> MeasureFit:
        asked, seed = self.experiment.evaluate, self.experiment.seed
        if not asked.fit:
            return unmeasured
        chosen = self.experiment.training.precision
        rounds = self.experiment.rounds
        return OwnFit(split_of, test_of, asked.fit, seed, asked.every, rounds, self.as_in, self._settle, chosen)

    def hosts(self) -> Callable[[Context], ClientHost]:
        """The resident client side of one process, by node: clients of one capacity share a host."""
        hosts = [federation.host() for federation in [self, *self.others()]]
        members = capacities.members(self.experiment)
        of = {partition: host for host, partitions in zip(hosts, members, strict=True) for partition in partitions}
        return lambda context: of[int(context.node_config[PARTITION])]

    def complete(self, params: Params) -> nn.Module:
        """The model under these global parameters, with statistics that fit, as the server can measure it."""
        return self.settled(load(self.model, params))

    def settled(self, model: nn.Module) -> nn.Module:
        """A model of this federation with statistics that fit its weights: measured by the server where none travel."""
        if self.experiment.model.statistics != "average":
            chosen = self.experiment.training.precision
            recalibrate(model, (self.data.proxy or self.data.validation).to(self.device), precision=chosen)
        return model


def plain_model(experiment: Experiment, data: Data, seed: int) -> nn.Module:
    """The architecture of an experiment, made from `seed` alone, on the CPU; no gates, nothing frozen.

    Raises:
        UserError: unknown model.
    """
    section = experiment.model
    channels, height, _ = data.shape
    return models.build(
        section.name,
        num_classes=data.num_classes,
        in_channels=channels,
        image_size=height,
        width=section.width,
        seed=seed,
    )


def make_model(experiment: Experiment, data: Data, seed: int) -> tuple[nn.Module, Gating | None]:
    """The model of an experiment as its method trains it, and its gating as this model settles it.

    Frozen parameters require no gradient. Given weights (`model.weights`) fill only what never travels.

    Raises:
        UserError: unknown model or initialisation, `model.trainable` selects nothing, or given weights that do not fit.
    """
    section, gating = experiment.model, experiment.gating
    model = plain_model(experiment, data, seed)
    batchnorm_only = "batchnorm" in section.trainable.split("+")
    init = section.batchnorm_init or ("uniform" if batchnorm_only else None)
    if init is not None:
        models.initialise(model, init, seed=derive(seed, Purpose.MODEL))
    if gating is not None:
        gated = gating.wrap(model, seed=derive(seed, Purpose.GATES))
        gating = gating.settled(gated, data.shape)
        gated.set_keep(gating.keep)
        model = gated
    models.freeze(model, section.trainable, seed=derive(seed, Purpose.MODEL, 1))
    travelling = _travelling(experiment, model)
    load(model, {n: p for n, p in given_weights(experiment, model).items() if n not in travelling})
    return model, gating


def given_weights(experiment: Experiment, model: nn.Module) -> Params:
    """The entries of the model that the experiment starts from, under the names of `model`; none without one.

    Raises:
        UserError: no such file, or it holds another model.
    """
    path = experiment.model.weights
    return {} if path is None else entries_for(model, read(Path(path)))


def _travelling(experiment: Experiment, model: nn.Module) -> list[str]:
    """Names of the entries that payloads carry: trainable parameters and, where they are averaged, statistics."""
    named = dict(model.named_parameters())
    averaged = experiment.model.statistics == "average"
    return [n for n in snapshot(model) if (named[n].requires_grad if n in named else averaged)]


def make_exchange(experiment: Experiment, model: nn.Module) -> wire.Exchange:
    """What travels: trainable parameters and, where they are averaged, BatchNorm statistics."""
    params, named = snapshot(model), dict(model.named_parameters())
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    statistics = [name for name in params if name not in named]
    travelling = {n: params[n] for n in _travelling(experiment, model)}
    prunable = [name for name in models.prunable_names(model) if name in travelling]
    schema = codecs.Schema.of(travelling, prunable)
    digest = wire.Frozen.digest_of({n: p for n, p in params.items() if n in frozen})
    return wire.Exchange(
        schema,
        experiment.wire.uplink,
        experiment.wire.downlink,
        experiment.wire.error_feedback,
        frozen=wire.Frozen(experiment.seed, digest) if frozen else None,
        personal=tuple(statistics) if experiment.model.statistics == "local" else (),
    )


def untravelled(model: nn.Module, exchange: wire.Exchange) -> Params:
    """Frozen weights and personal entries of a model: what a client holds and no payload carries."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in snapshot(model).items() if name in frozen or name in exchange.personal}


def make_client_app(experiment: Experiment) -> ClientApp:
    """The Flower ClientApp of an experiment; its host is built now, so that no client's time contains it."""
    # An optimiser of PyTorch imports hundreds of modules when the first one is made, seconds on a busy machine.
    OPTIMIZERS[experiment.training.optimizer]([nn.Parameter(torch.zeros(1))], experiment.training)
    return client_app(Federation.build(experiment).hosts())


def resolved(experiment: Experiment, federation: Federation) -> Experiment:
    """Settle what depends on the machine once, so that every worker computes the same numbers."""
    if experiment.training.precision != "auto":
        return experiment
    chosen = precision.choose(
        federation.model, federation.data.shape, experiment.training.batch_size, federation.device
    )
    return experiment.model_copy(update={"training": replace(experiment.training, precision=chosen)})
