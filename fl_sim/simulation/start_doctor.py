"""Whether the federation of a config can be made: its data, their partition and its models, as a run makes them before round 1."""

from __future__ import annotations

from fl_sim.config.experiment import Experiment
from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.runtime.client.doctor import Finding
from fl_sim.simulation.federation import Federation

CHECK = "Its data load, are split over the clients, and fit its models"


def examine_start(experiment: Experiment) -> Finding:
    """Make the federation of an experiment; the problem is the line with which a run would end."""
    try:
        # Any precision: "auto" would time this machine.
        Federation.build(experiment, precision="float32", quiet=True)
    except UserError as error:
        return Finding(CHECK, str(error))
    except USERS_OWN as error:  # a part of the user's own, whatever it raises
        return Finding(CHECK, f"it raised {error_line(error)}")
    return Finding(CHECK, "")
