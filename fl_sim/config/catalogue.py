"""What a config can name, with one line each, read from the code itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping

from fl_sim import codecs, models
from fl_sim.communication.virtual_clock import PRESETS
from fl_sim.data import PARTITIONS, SOURCES
from fl_sim.training.loop import SCHEDULES

CONTENTS = {
    "parameters": "The parameters themselves, bit for bit.",
    "difference": "Their change against what the receiver knows: what lossy value types need.",
}


def first_line(thing: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def functions(module: str) -> dict[str, Callable[..., object]]:
    """Public functions defined in a module, by import path."""
    loaded = importlib.import_module(module)
    found = inspect.getmembers(loaded, inspect.isfunction)
    return {f"{module}:{name}": f for name, f in found if f.__module__ == module and not name.startswith("_")}


def _lines(things: Mapping[str, object]) -> dict[str, str]:
    return {name: first_line(thing) for name, thing in things.items()}


def _schedules() -> dict[str, str]:
    """Classes of pruning schedules, which rules of one's own compose."""
    module = importlib.import_module("fl_sim.core.schedules")
    found = inspect.getmembers(module, inspect.isclass)
    return {n: first_line(c) for n, c in found if c.__module__ == module.__name__ and not n.startswith("_")}


def catalogue() -> Mapping[str, Mapping[str, str]]:
    """Title -> name -> one line."""
    links = {name: f"{k.down_mbps:g} Mbit/s down, {k.up_mbps:g} up, {k.latency_ms:g} ms" for name, k in PRESETS.items()}
    return {
        "clients": _lines(functions("clients.presets")),
        "strategies": _lines(functions("strategies.presets")),
        "models": _lines(models.MODELS),
        "data": _lines(SOURCES),
        "partitions": _lines(PARTITIONS),
        "schedules": {**_lines(SCHEDULES), **_schedules()},
        "values": _lines(codecs.VALUES),
        "contents": CONTENTS,
        "links": links,
    }


KEYS = {
    "clients": "client",
    "strategies": "strategy",
    "models": "model.name",
    "data": "data.source",
    "partitions": "data.partition",
    "schedules": "training.schedule; of pruning: fl_sim.sparsity",
    "values": "wire.uplink.values, wire.downlink.values",
    "contents": "wire.uplink.content, wire.downlink.content",
    "links": "network.links",
}
"""Title -> the config keys that take these names."""
