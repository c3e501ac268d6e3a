"""One run from start to report: the round loop, engines, checkpoints, sweeps.

>>> from fl_sim.simulation import run
"""

from __future__ import annotations

import importlib

__all__ = ["RunStopped", "resume", "run"]
_HOMES = {"RunStopped": "loop", "resume": "loop", "run": "loop"}


def __getattr__(name: str) -> object:
    """Import a name when it is first used: worker processes need the federation, not the round loop."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fl_sim.simulation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fl_sim.simulation.{_HOMES[name]}"), name)
