"""Check of the last batches of the clients before round 1: what is left out, and whom nothing is left for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

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
        UserError: a client has one sample, and BatchNorm cannot train on it.
    """
    for track in federation.tracks:
        training = getattr(client_of(track), "training", None)
        if isinstance(training, Training):
            _check(track, training, [federation.sizes[client] for client in track.members])


def _check(track: ModelTrack, training: Training, sizes: Sequence[int]) -> None:
    name, batch = track.experiment.model.name, training.batch_size
    one, alone = sum(size == 1 for size in sizes), sum(size % batch == 1 and size > 1 for size in sizes)
    if batch > 1 and (one or alone) and _refuses_one(track):
        if one:
            raise UserError(
                f"model.name = {name!r}: BatchNorm cannot train on a single sample, and {one} of {len(sizes)} clients have no "
                "more; needed: data.min_size = 2, or another model"
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
