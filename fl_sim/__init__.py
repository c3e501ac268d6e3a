"""Federated-learning simulation whose communication numbers are the bytes it encoded.

from fl_sim import Experiment, run
report = run(Experiment.load("configs/quickstart.toml"))
print(report.summary["saving"])
"""

import importlib
import typing

from fl_sim import _moved
from fl_sim.core import own_packages

if typing.TYPE_CHECKING:
    from fl_sim.config.experiment import Experiment
    from fl_sim.core.errors import UserError
    from fl_sim.core.types import Mask, MaskRule, Params, Task, Update
    from fl_sim.models.macs import count_macs
    from fl_sim.models.parameters import load, snapshot
    from fl_sim.report import Report
    from fl_sim.simulation.loop import run
    from fl_sim.training.client import Client, ClientContext
    from fl_sim.training.evaluation import evaluate
    from fl_sim.training.loop import local_sgd
    from fl_sim.training.losses import cross_entropy

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

_HOMES = {
    "config.experiment": ["Experiment"],
    "core.errors": ["UserError"],
    "core.types": ["Mask", "MaskRule", "Params", "Task", "Update"],
    "models.macs": ["count_macs"],
    "models.parameters": ["load", "snapshot"],
    "report": ["Report"],
    "simulation": ["run"],
    "training.client": ["Client", "ClientContext"],
    "training.evaluation": ["evaluate"],
    "training.loop": ["local_sgd"],
    "training.losses": ["cross_entropy"],
}

_moved.install()
own_packages.install()


def __getattr__(name: str) -> object:
    """Import a name or a submodule when it is first used: importing this package imports neither PyTorch nor Flower."""
    if name.startswith("_"):
        raise AttributeError(name)
    home = next((module for module, names in _HOMES.items() if name in names), None)
    try:
        found: object = importlib.import_module(f"fl_sim.{home or name}")
    except ModuleNotFoundError as error:
        raise AttributeError(f"module 'fl_sim' has no attribute {name!r}") from error
    if home is not None:
        found = globals()[name] = getattr(found, name)
    return found
