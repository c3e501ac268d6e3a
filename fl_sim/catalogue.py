"""What a config can name, with one line each, read from the code itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping

from fl_sim import codecs, models
from fl_sim.data import PARTITIONS, SOURCES
from fl_sim.wire import CONTENTS


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def _functions(module: str) -> dict[str, str]:
    """Public functions defined in a module, by import path."""
    loaded = importlib.import_module(module)
    found = inspect.getmembers(loaded, inspect.isfunction)
    return {
        f"{module}:{name}": _first_line(f) for name, f in found if f.__module__ == module and not name.startswith("_")
    }


def catalogue() -> Mapping[str, Mapping[str, str]]:
    """Title -> name -> one line."""
    return {
        "clients": _functions("clients.presets"),
        "strategies": _functions("strategies.presets"),
        "models": {name: _first_line(build) for name, build in models.MODELS.items()},
        "data sources": {name: _first_line(source) for name, source in SOURCES.items()},
        "partitions": {name: _first_line(partition) for name, partition in PARTITIONS.items()},
        "wire values": {name: _first_line(coder) for name, coder in codecs.VALUES.items()},
        "wire contents": dict.fromkeys(CONTENTS, ""),
    }
