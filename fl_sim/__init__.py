"""Federated-learning simulation whose communication numbers are the bytes it encoded.

from fl_sim import Experiment, run
report = run(Experiment.load("configs/quickstart.toml"))
print(report.summary["saving"])
"""

from fl_sim.config import Experiment
from fl_sim.flops import count_macs
from fl_sim.losses import cross_entropy
from fl_sim.report import Report
from fl_sim.simulation import run
from fl_sim.training import evaluate, load, local_sgd, snapshot
from fl_sim.types import Client, ClientContext, Mask, MaskRule, Params, Task, Update, UserError

__all__ = [
    "Client",
    "ClientContext",
    "Experiment",
    "Mask",
    "MaskRule",
    "Params",
    "Report",
    "Task",
    "Update",
    "UserError",
    "count_macs",
    "cross_entropy",
    "evaluate",
    "load",
    "local_sgd",
    "run",
    "snapshot",
]
