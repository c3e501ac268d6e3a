"""The client side of one process: the ClientApp of an experiment, with its models and data resident."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import nn

from fl_sim.communication.messages import PARTITION
from fl_sim.config.experiment import Experiment
from fl_sim.core.lookup import imported
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import Params, UserError
from fl_sim.data import CropFlip, Split, matching
from fl_sim.runtime.by_value import unpack
from fl_sim.runtime.client.host import ClientHost, client_app
from fl_sim.runtime.client.over_fitting import MeasureFit, OwnFit, Settle, keep_statistics, no_measurement
from fl_sim.runtime.worlds import World, require_same
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.simulation.starting_model import make_model, untravelled
from fl_sim.simulation.user_code import own_code
from fl_sim.training.client import Client
from fl_sim.training.loop import OPTIMIZERS
from fl_sim.training.recalibration import recalibrate
from fl_sim.training.tasks import learning_task

AUGMENT = {"none": None, "crop_flip": CropFlip()}
TEST_SIZE = 500
"""Test samples on which one client evaluates."""


def client_of(track: ModelTrack) -> Client:
    """Make the client that the config names.

    Raises:
        UserError: no such client, or not with these options.
    """
    experiment = track.experiment
    client = cast(
        Client, experiment.client.build({"training": experiment.local_training, "gating": track.gating}, "client")
    )
    if experiment.attack is None:
        return client
    attacked = cast("Callable[..., Client]", imported("", "clients.attacks:attacked"))
    classes = track.data.num_classes if learning_task(experiment.task).class_scores else 0
    run = {"seed": experiment.seed, "num_clients": experiment.data.clients, "cohort_size": experiment.step_size}
    return attacked(client, **dict(experiment.attack), **run, classes=classes)


def attackers_of(experiment: Experiment) -> tuple[int, ...]:
    """Numbers of the clients that attack; empty without `[attack]`."""
    if experiment.attack is None:
        return ()
    drawn = cast("Callable[..., tuple[int, ...]]", imported("", "clients.attacks:attackers_of"))
    return drawn(share=experiment.attack.share, seed=experiment.seed, num_clients=experiment.data.clients)


def host_of(federation: Federation, track: ModelTrack) -> ClientHost:
    """Make the resident client side of one model in this process."""
    experiment, device = track.experiment, track.device
    train, test = federation.data.train.augmented(AUGMENT[experiment.data.augment]), federation.data.test

    natural = experiment.data.partition == "natural"

    @cache
    def split_of(partition: int) -> Split:
        return train.subset(federation.partitions[partition]).to(device)

    @cache
    def test_of(partition: int) -> Split:
        kind = federation.data.train.labels.numpy()[federation.partitions[partition]]
        rng = numpy_generator(experiment.seed, partition, Purpose.EVALUATION)
        if federation.held is not None:
            return federation.data.train.subset(federation.held[partition]).to(device)
        if natural:
            return test.subset(federation.own_tests[partition]).to(device)
        return test.subset(matching(test.labels.numpy(), kind, size=TEST_SIZE, rng=rng)).to(device)

    @cache
    def rebuild(announced: int) -> Params:
        seed = (
            experiment.seed if track.exchange.frozen is None else announced
        )  # nobody announces one without frozen weights
        return untravelled(make_model(experiment, federation.data, seed, track.weights)[0], track.exchange)

    return ClientHost(
        client=client_of(track),
        model=track.model,
        split_of=split_of,
        test_of=test_of,
        exchange=track.exchange,
        reference=track.initial,
        rebuild=rebuild,
        measure=_measure(track, split_of, test_of),
        settle=_settle(track),
        built=track.built,
        world=federation.world,
        learning=experiment.learning,
    )


def _settle(track: ModelTrack) -> Settle:
    """Statistics of a model on a client: measured where none travel and clients keep none."""
    if track.experiment.model.statistics != "recalibrate":
        return keep_statistics
    return partial(recalibrate, precision=track.experiment.training.precision)


def _measure(track: ModelTrack, split_of: Callable[[int], Split], test_of: Callable[[int], Split]) -> MeasureFit:
    experiment = track.experiment
    asked, chosen = experiment.evaluate, experiment.training.precision
    if not asked.fit:
        return no_measurement
    return OwnFit(
        seen=split_of,
        unseen=test_of,
        samples=asked.fit,
        seed=experiment.seed,
        every=asked.every,
        rounds=experiment.rounds,
        setting=track.as_in,
        settle=_settle(track),
        precision=chosen,
        learning=learning_task(experiment.task),
    )


def hosts_of(federation: Federation) -> Callable[[Context], ClientHost]:
    """The resident client side of one process, by node: clients of one model share a host."""
    hosts = [host_of(federation, track) for track in federation.tracks]
    if len(hosts) == 1:
        return lambda context: hosts[0]
    of = {p: host for host, track in zip(hosts, federation.tracks, strict=True) for p in track.members}
    return lambda context: of[int(context.node_config[PARTITION])]


def make_client_app(
    experiment: Experiment, servers: World | None = None, own: bytes = b"", version: str | None = None
) -> ClientApp:
    """Build the Flower ClientApp of an experiment in this process; its host is built now, not in a client's time.

    Args:
        experiment: as the server settled it.
        servers: hashes of what the server has built, to be compared with; None compares nothing.
        own: functions of the program's `__main__`, as `fl_sim.runtime.by_value` packs them.
        version: hash of the server's fl_sim (`own_code`), to be compared with on other machines.

    Raises:
        UserError: data, model or code differ from the server's.
    """
    if version is not None and (found := own_code()) != version:
        raise UserError(f"fl_sim there has other code ({found}) than here ({version}) under the same version number")
    unpack(own)
    # An optimiser of PyTorch imports hundreds of modules when the first one is made, seconds on a busy machine.
    OPTIMIZERS[experiment.training.optimizer]([nn.Parameter(torch.zeros(1))], experiment.training)
    federation = Federation.build(experiment, quiet=True)
    if servers is not None:
        require_same(servers, federation.world, "a worker process")
    hosts = hosts_of(federation)
    for track in federation.tracks:
        track.give_up_first_values()
    return client_app(hosts)
