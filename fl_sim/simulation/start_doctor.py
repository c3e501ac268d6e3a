"""Whether the federation of a config can be made: its data, their partition, models, client and server, as before round 1."""

from __future__ import annotations

from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.runtime.client.doctor import Finding
from fl_sim.simulation.engines import settled
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.model_facts import dense_payloads
from fl_sim.simulation.parts import check, check_built
from fl_sim.simulation.server import build_server

CHECK = "Its data load, are split over the clients, and fit its models, client and strategy"


def examine_start(experiment: Experiment) -> Finding:
    """Make the federation of an experiment and its server; the problem is the line with which a run would end.

    What a run says before its first round, of keys without effect and the like, is logged.
    """
    try:
        experiment, _ = settled(experiment)
        check(experiment)
        # Any precision: "auto" would time this machine.
        federation = Federation.build(experiment, precision="float32", quiet=True)
        check_built(federation)
        build_server(federation, Ledger())
        dense_payloads(federation)  # which builds each plain model once more
    except UserError as error:
        return Finding(CHECK, str(error))
    except USERS_OWN as error:  # a part of the user's own, whatever it raises
        return Finding(CHECK, f"it raised {error_line(error)}")
    return Finding(CHECK, "")
