"""Check before round 1 of models that answer otherwise in training than in evaluation, as those with auxiliary heads do."""

from __future__ import annotations

import logging

from fl_sim.core.types import UserError
from fl_sim.runtime.client.kept_between_calls import homes
from fl_sim.simulation.client_side import client_of
from fl_sim.simulation.model_track import ModelTrack

log = logging.getLogger("fl_sim")


def check_training_answer(track: ModelTrack) -> None:
    """Complain where this package's losses would get what a model answers in training alone; where others get it, say so.

    Raises:
        UserError: names the model, what it answers, and what is needed.
    """
    if not track.training_answer:
        return
    experiment = track.experiment
    client, task = f"client = {experiment.client.target!r}", f"task = {experiment.task!r}"
    what = f"model.name = {experiment.model.name!r}: in training it answers {track.training_answer}"
    if homes(client_of(track)):
        log.warning("%s: %s has to take its loss from that", what, client)
    elif ":" in experiment.task:
        log.warning("%s: the criterion of %s gets that from %s", what, task, client)
    else:
        raise UserError(
            f"{what}; {client} needs the same answer in both modes, for instance by the model's option aux_logits=False, by a "
            "wrapper that returns the main output alone, or use a client of your own with a loss of all outputs"
        )
