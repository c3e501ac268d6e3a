"""Federation: data, partitions and models, built alike by server and clients from an experiment."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fl_sim.config.experiment import Experiment
from fl_sim.core.given import MAIN
from fl_sim.core.process_state import seeded
from fl_sim.core.seeding import Purpose, generator, numpy_generator
from fl_sim.core.types import UserError
from fl_sim.data import Data, Split, label_counts
from fl_sim.data import partition as make_partition
from fl_sim.data.kinds import Inputs, Targets, described, input_kind
from fl_sim.data.parts import Parts
from fl_sim.models import MODELS
from fl_sim.models.adapters import left_frozen, some_of
from fl_sim.models.layers import head_module
from fl_sim.runtime.worlds import World, fingerprint
from fl_sim.simulation import capacity_groups
from fl_sim.simulation.identity import code_of_parts, load_data_of, parts_of
from fl_sim.simulation.model_track import ModelTrack, device_of
from fl_sim.simulation.starting_model import read_weights
from fl_sim.training import precision as precisions
from fl_sim.training.further_metrics import require_outputs
from fl_sim.training.starting_weights import fit

log = logging.getLogger("fl_sim")
BLOCK = 4096
"""Clients whose labels are counted at a time."""
EMULATED = 1.5
"""Times the seconds of a float32 step from which on a precision is remarked upon."""


@dataclass(frozen=True)
class Federation:
    """Data, partitions and models of an experiment, built once in each process.

    Attributes:
        experiment: with all that depends on the machine settled (`training.precision`).
        data: training, validation, test and proxy samples.
        partitions: for each client, positions of its training samples.
        tracks: the models, `[model]` first, then one for each of `[[capacities]]`.
        held: for each client, positions of its own samples that it evaluates on (`data.client_test`); None = those of the
            test set.
    """

    experiment: Experiment
    data: Data
    partitions: Parts
    tracks: tuple[ModelTrack, ...]
    held: Parts | None = None

    @classmethod
    def build(cls, experiment: Experiment, *, precision: str | None = None, quiet: bool = False) -> Federation:
        """Load data, partition it, make the seeded models, and choose the precision where it is "auto".

        Args:
            experiment: as the user wrote it.
            precision: takes the place of "auto", for a run that is resumed; None = chosen by a probe of this machine.
            quiet: log no remarks on data, weights and precision, where the server logs them.

        Raises:
            UserError: data missing, partition impossible, or model unknown.
        """
        torch.set_num_threads(1)
        data = _load(experiment, quiet)
        partitions, held = _with_tests_apart(experiment, _partitions(experiment, data))
        tracks = _tracks(experiment, data, quiet)
        if experiment.training.precision == "auto":
            chosen = precision or _probed(experiment, tracks[0])
            experiment = _computing_in(chosen, experiment)
            tracks = tuple(replace(each, experiment=_computing_in(chosen, each.experiment)) for each in tracks)
        elif experiment.training.precision == "bfloat16" and not quiet:
            _warn_of_emulation(experiment, tracks[0])
        return cls(experiment, data, partitions, tracks, held)

    @property
    def first(self) -> ModelTrack:
        """The model that `[model]` names."""
        return self.tracks[0]

    @cached_property
    def code(self) -> dict[str, dict[str, str]]:
        """Config key -> file -> hash of the user's code behind it (`user_code.code_of`), read once."""
        return code_of_parts(self.experiment)

    @cached_property
    def world(self) -> World:
        """Hashes of what this process has built, to be compared with those of other processes. Clients run no strategy, and
        get functions of the program's `__main__` from the server itself."""
        sent = {key for key, path in parts_of(self.experiment) if path.startswith(f"{MAIN}:")}
        code = {key: code for key, code in self.code.items() if not key.startswith("strategy") and key not in sent}
        return fingerprint(
            self.data, self.partitions, [(t.initial, t.exchange, t.built.digest()) for t in self.tracks], code
        )

    def label_counts(self) -> Iterator[NDArray[np.int64]]:
        """Training samples of each client (row) by class (column), some thousand clients at a time; of targets that are no
        classes, one column of all."""
        classes, labels = self.data.num_classes, self.data.train.labels.numpy()
        for first in range(0, len(self.partitions), BLOCK):
            some = self.partitions[first : first + BLOCK]
            by_class = self.data.targets is Targets.CLASSES
            yield label_counts(labels, some, classes) if by_class else some.sizes[:, None]

    @cached_property
    def sizes(self) -> list[int]:
        """Training samples of each client."""
        sizes: list[int] = self.partitions.sizes.tolist()
        return sizes

    @cached_property
    def own_tests(self) -> Parts:
        """Positions of each client's test samples where the partition is natural: those of its groups.

        Raises:
            UserError: a client's groups have no test sample.
        """
        train, test = self.data.train.groups, self.data.test.groups
        if train is None or test is None:
            raise UserError(
                "data.partition = 'natural': the test set has no groups, so that clients have no test samples"
            )
        owner = np.full(len(self.data.groups), -1)
        owner[train.numpy()[self.partitions.positions]] = self.partitions.owner
        whose = owner[test.numpy()]
        order = np.argsort(whose, kind="stable")
        cuts = np.searchsorted(whose[order], np.arange(len(self.partitions) + 1))
        own = Parts(order, cuts)
        without = np.flatnonzero(own.sizes == 0)
        if len(without):
            group = self.data.groups[int(train[self.partitions[without[0]][0]])]
            raise UserError(
                f"data.partition = 'natural': {len(without)} of {len(own)} clients have no test sample, the first of them "
                f"that of group {group!r}; needed where clients evaluate (evaluate.clients, evaluate.fit)"
            )
        return own

    def proxy(self) -> Split | None:
        """Images that the server holds: a share of the training set, or noise; None unless the config asks for them."""
        count = self.experiment.data.noise
        rng = generator(self.experiment.seed, Purpose.DATA)
        held = self.data.train.noise(count, rng) if count else self.data.proxy
        return None if held is None else held.to(device_of(self.experiment))


def _load(experiment: Experiment, quiet: bool) -> Data:
    section, learning = experiment.data, experiment.learning
    data = load_data_of(experiment, quiet=quiet)
    if data.targets is not learning.targets:
        held = described(data.train.labels)
        raise UserError(
            f"task = {experiment.task!r}: needs {learning.targets.value}; data.source = {section.source!r} has {held}"
        )
    require_outputs(experiment.evaluate.metrics, data.num_classes)
    if section.weigh_clients:
        if data.train.weights is None:
            raise UserError(
                "data.weigh_clients = true: the samples have no weights; set data.weight or data.class_weights"
            )
        data = replace(data, train=replace(data.train, by_weight=True))
    if not len(data.test) or (section.validation and not len(data.validation)):
        sizes = f"{len(data.validation)} for validation, {len(data.test)} for test"
        raise UserError(f"data.validation = {section.validation:g} of {section.source!r}: {sizes}; needed: some")
    if section.augment != "none" and input_kind(data.train.stored) is not Inputs.IMAGES:
        raise UserError(f"data.augment = {section.augment!r}: is for images; inputs are {described(data.train.stored)}")
    return data


def _partitions(experiment: Experiment, data: Data) -> Parts:
    section = experiment.data
    groups = None if data.train.groups is None else data.train.groups.numpy()
    with seeded(experiment.seed):  # for a partitioner of the user's that draws from global generators
        return make_partition(
            data.train.labels.numpy(),
            section.clients,
            kind=section.partition,
            alpha=section.alpha,
            shards=section.shards,
            min_size=section.min_size,
            seed=experiment.seed,
            groups=groups,
            overlap=section.overlap,
            options=section.partitioner,
        )


def _with_tests_apart(experiment: Experiment, partitions: Parts) -> tuple[Parts, Parts | None]:
    """What each client trains on, and the share of its samples that it evaluates on; None where they are of the test set."""
    share = experiment.data.client_test
    if not share:
        return partitions, None
    kept, held = [], []
    for client, positions in enumerate(partitions):
        rng = numpy_generator(experiment.seed, client, Purpose.EVALUATION)
        count = max(1, round(share * len(positions)))
        if count >= len(positions):
            raise UserError(
                f"data.client_test = {share:g}: client {client} has {len(positions)} samples, which leave none to train on; "
                "raise data.min_size, or lower the share"
            )
        drawn = rng.permutation(positions)
        kept.append(np.sort(drawn[count:]))
        held.append(np.sort(drawn[:count]))
    return Parts.of(kept), Parts.of(held)


def _tracks(experiment: Experiment, data: Data, quiet: bool) -> tuple[ModelTrack, ...]:
    weights = read_weights(experiment)
    tracks = tuple(
        ModelTrack.build(
            group.experiment,
            data,
            label=group.label,
            members=group.members,
            cohort_size=group.cohort_size,
            weights=weights if number == 0 else None,
        )
        for number, group in enumerate(capacity_groups.groups(experiment))
    )
    for line in () if weights is None or quiet else fit(tracks[0].model, weights, tracks[0].contents).lines():
        log.warning("model.weights: %s: %s", experiment.model.weights, line)
    adapter = experiment.model.adapter
    if not quiet:
        for track in tracks:
            for line in track.remarks:
                log.warning("model.name = %r: %s", track.experiment.model.name, line)
        _say_head(experiment, tracks[0])
    if not quiet and adapter is not None and not adapter.targets and (frozen := left_frozen(tracks[0].model)):
        log.warning(
            "model.adapter: %s: frozen, and without adapters: something else computes these weights, or uses them too",
            some_of(frozen),
        )
    return tracks


def _say_head(experiment: Experiment, track: ModelTrack) -> None:
    """Say which layer of a user's own model is its head, where the config speaks of one: nobody named it."""
    section = experiment.model
    asked = [section.trainable, section.personal or "", (section.adapter.train or "") if section.adapter else ""]
    if section.name not in MODELS and any("head" in each.split("+") for each in asked):
        log.warning("model.name = %r: its head is %r", section.name, head_module(track.model))


def _probed(experiment: Experiment, track: ModelTrack) -> str:
    batch_size = experiment.training.batch_size
    return precisions.choose(track.model, track.data.train.example(batch_size, track.device))


def _warn_of_emulation(experiment: Experiment, track: ModelTrack) -> None:
    """Say where the asked precision is far slower than float32: processors without its instructions emulate them."""
    batch = track.data.train.example(experiment.training.batch_size, track.device)
    if (times := precisions.times_float32("bfloat16", track.model, batch)) > EMULATED:
        log.warning(
            'training.precision = "bfloat16": a training step takes %.1f times that of "float32" on this machine, whose '
            'processor may have no instructions for it; "auto" takes the fastest',
            times,
        )


def _computing_in(precision: str, experiment: Experiment) -> Experiment:
    return experiment.model_copy(update={"training": replace(experiment.training, precision=precision)})
