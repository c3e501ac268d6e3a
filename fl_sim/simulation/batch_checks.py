"""Check of the last batches of the clients before round 1: what is left out, and whom nothing is left for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import count

import torch

from fl_sim.core.types import UserError
from fl_sim.simulation.client_side import client_of
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.training.loop import Training
from fl_sim.training.passes import refuses_batch_of_one

log = logging.getLogger("fl_sim")


def check_batches(federation: Federation) -> None:
    """Say which clients leave samples out, because of BatchNorm or `training.drop_last`.

    Raises:
        UserError: a client has one sample to train on, and BatchNorm cannot, or it has none, as it holds samples out.
    """
    for track in federation.tracks:
        client = client_of(track)
        training, trained_on = getattr(client, "training", None), getattr(client, "trained_on", _all)
        sizes = [trained_on(federation.sizes[member]) for member in track.members]
        if none := sizes.count(0):
            raise UserError(
                f"client = {track.experiment.client.target!r}: holds samples out, and {none} of {len(sizes)} clients have none "
                f"left to train on; needed: data.min_size = {_least(trained_on, 1)}"
            )
        if isinstance(training, Training):
            _check(track, training, sizes, _least(trained_on, 2))


def _all(samples: int) -> int:
    """A client that holds nothing out trains on all of its samples."""
    return samples


def _least(trained_on: Callable[[int], int], needed: int) -> int:
    """Samples of a client that trains on so many of them."""
    return next(samples for samples in count(needed) if trained_on(samples) >= needed)


def _check(track: ModelTrack, training: Training, sizes: Sequence[int], least: int) -> None:
    name, batch = track.experiment.model.name, training.batch_size
    one, alone = sum(size == 1 for size in sizes), sum(size % batch == 1 and size > 1 for size in sizes)
    if batch > 1 and (one or alone) and _refuses_one(track):
        if one:
            raise UserError(
                f"model.name = {name!r}: BatchNorm cannot train on a single sample, and {one} of {len(sizes)} clients have no "
                f"more; needed: data.min_size = {least}, or another model"
            )
        if not training.drop_last:
            log.warning(
                "model.name = %r: BatchNorm cannot train on a last batch of one sample: %d of %d clients leave that sample of "
                "each epoch out (another one each time)",
                name,
                alone,
                len(sizes),
            )
    if training.drop_last and (small := sum(size < batch for size in sizes)):
        log.warning(
            "training.drop_last: %d of %d clients have fewer samples than training.batch_size = %d: they keep that one batch",
            small,
            len(sizes),
            batch,
        )


def _refuses_one(track: ModelTrack) -> bool:
    with torch.random.fork_rng(devices=[]):
        return refuses_batch_of_one(track.model, track.data.train)
