"""Catalogue of everything that a config or a command can name, with one line each, read from the code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping

from fl_sim import codecs, models
from fl_sim.communication.estimates import ESTIMATES
from fl_sim.communication.exchange import CONTENTS
from fl_sim.communication.replay import MASKS
from fl_sim.communication.virtual_clock import PRESETS
from fl_sim.config.codecs import CODECS
from fl_sim.core.lookup import imported
from fl_sim.data import PARTITIONS
from fl_sim.data.sources import ARRAYS
from fl_sim.data.text import TEXTS
from fl_sim.gating import SALIENCES
from fl_sim.sparsity import magnitude
from fl_sim.sparsity.one_model import METHODS, ByScore
from fl_sim.training.loop import SCHEDULES
from fl_sim.training.tasks import WORDS

ENGINES = {
    "inline": "One process: clients train one after the other; every other engine gives the same result.",
    "workers": "Forked processes of this machine that share its memory.",
    "ray": "Ray actors: several machines.",
    "cohort": "One process that trains a round's clients as one batch: for tiny models, or a GPU that one client does not fill.",
    "auto": "One of the above, by a rule over model, cohort, cores and device; a run says which and why.",
    "flower": "Flower's own SuperLink and SuperNodes: `flwr run examples/flower`.",
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


def _attacks() -> Mapping[str, object]:
    found: Mapping[str, object] = importlib.import_module("clients.attacks").ATTACKS
    return found


def _prune_methods() -> dict[str, str]:
    """By what each differs from the others: its score, or how it allocates what stays."""
    lines: dict[str, object] = dict(METHODS)
    for name, method in METHODS.items():
        if isinstance(method, ByScore):
            lines[name] = method.allocate if method.score is magnitude else method.score
    return _lines(lines)


def catalogue() -> Mapping[str, Mapping[str, str]]:
    """Title -> name -> one line."""
    links = {name: f"{k.down_mbps:g} Mbit/s down, {k.up_mbps:g} up, {k.latency_ms:g} ms" for name, k in PRESETS.items()}
    return {
        "clients": _lines(functions("clients.presets")),
        "strategies": _lines(functions("strategies.presets")),
        "attacks": _lines(_attacks()),
        "tasks": WORDS,
        "models": _lines(models.MODELS),
        "data": {**_lines(ARRAYS), **TEXTS},
        "partitions": _lines(PARTITIONS),
        "schedules": {**_lines(SCHEDULES), **_schedules()},
        "values": _lines(codecs.VALUES),
        "codecs": _lines({name: imported("", path) for name, path in CODECS.items()}),
        "contents": {name: content.summary for name, content in CONTENTS.items()},
        "links": links,
        "engines": ENGINES,
        "saliences": _lines(SALIENCES),
        "prune-methods": _prune_methods(),
        "mask-codecs": _lines(MASKS),
        "estimates": _lines(ESTIMATES),
    }


KEYS = {
    "clients": "client",
    "strategies": "strategy",
    "attacks": "attack.kind",
    "tasks": "task",
    "models": "model.name",
    "data": "data.source",
    "partitions": "data.partition",
    "schedules": "training.schedule; of pruning: fl_sim.sparsity",
    "values": "wire.uplink.values, wire.downlink.values",
    "codecs": "wire.codec.uplink, wire.codec.downlink",
    "contents": "wire.uplink.content, wire.downlink.content",
    "links": "network.links",
    "engines": "engine",
    "saliences": "gating.salience",
    "prune-methods": "fl-sim prune --method",
    "mask-codecs": "fl-sim replay --mask",
    "estimates": "formulas in summary.json and the report",
}
"""Title -> where these names are written."""
