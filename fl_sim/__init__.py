"""Federated-learning simulation whose communication numbers are the bytes it encoded.

from fl_sim import Experiment, run
report = run(Experiment.load("configs/quickstart.toml"))
print(report.summary["saving"])
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from fl_sim.config import Experiment
    from fl_sim.errors import UserError
    from fl_sim.flops import count_macs
    from fl_sim.losses import cross_entropy
    from fl_sim.report import Report
    from fl_sim.simulation import run
    from fl_sim.training import evaluate, load, local_sgd, snapshot
    from fl_sim.types import Client, ClientContext, Mask, MaskRule, Params, Task, Update

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
    "config": ["Experiment"],
    "errors": ["UserError"],
    "flops": ["count_macs"],
    "losses": ["cross_entropy"],
    "report": ["Report"],
    "simulation": ["run"],
    "training": ["evaluate", "load", "local_sgd", "snapshot"],
    "types": ["Client", "ClientContext", "Mask", "MaskRule", "Params", "Task", "Update"],
}


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
