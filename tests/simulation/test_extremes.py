"""Every number that a config can hold, at its extremes: refused in one line that names the key, or a run that takes it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from fl_sim import Experiment, run
from fl_sim.communication.ledger import Ledger
from fl_sim.config.reference import METHODS, functions, tables
from fl_sim.core.types import UserError
from fl_sim.simulation import RunStopped
from fl_sim.simulation.client_side import client_of
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.server import build_server

Tree = dict[str, object]
EXTREMES = (0, -1, -1.5, 0.5, 1e-300, 1e300, 2**31, 2**62, 2**70, math.nan, math.inf, -math.inf, True, "1", [1e300])
BASE: Tree = {
    "rounds": 1,
    "data": {"clients": 6},
    "cohort": {"size": 3},
    "model": {"name": "mlp", "width": 0.25},
    "training": {"steps": 1},
    "evaluate": {"clients": 1},
}
GATED: Tree = {
    "model": {"name": "cnn_bn", "width": 1.0},
    "client": {"target": "clients.presets:adaptive_pruning"},
    "gating": {},
}
SMALL = {"name": "resnet8", "width": 0.125}
PAIRED = ("scaffold", "feddyn", "fednova", "qfedavg")
"""Methods of a strategy and the client of the same name."""
NEEDED: Mapping[str, Tree] = {
    "gating": GATED,
    "study": {"study": {}},
    "stop": {"stop": {}, "network": {"links": {"3G": 1}}},
    "attack": {"attack": {"share": 0.5}},
    "schedule": {"schedule": {"kind": "fedbuff"}, "network": {"links": {"3G": 1}}, "evaluate": {"clients": 0}},
    "wire.broadcast": {"wire": {"broadcast": {}}},
    "wire.budget": {"wire": {"budget": {}, "uplink": {"content": "difference"}}},
    "network": {"network": {"links": {"3G": 1}}},
    "clients.presets:feature_distillation": {"client": {"stages": ["2"]}, "model": {"name": "cnn_bn", "width": 0.25}},
    **{f"strategies.presets:{name}": {"client": {"target": f"clients.presets:{name}"}} for name in PAIRED},
    "strategies.presets:layer_adaptive": {"strategy": {"kilobytes": 50}, "data": {"proxy": 0.1}},
    "strategies.presets:rate_distortion": {"strategy": {"levels": 3, "images": 4}},
    "strategies.presets:mixed_capacities": {
        "strategy": {"steps": 1},
        "data": {"proxy": 0.1},
        "model": SMALL,
        "capacities": [{**SMALL, "width": 0.25}],
    },
}
"""What a table or a preset needs beside it."""
WORK = {"rounds", "epochs", "steps", "levels"}
"""As much of it as is asked for is done: a run of 2^31 rounds is none to wait for."""


@dataclass(frozen=True)
class Place:
    """A numeric key, and a config in which it counts."""

    table: str
    key: str
    around: Tree

    def __str__(self) -> str:
        target = self.around.get(self.table, {}) if self.table in METHODS else {}
        return f"{target.get('target', self.table)}.{self.key}".lstrip(".")

    def holding(self, value: object, out: Path) -> Tree:
        below: Tree = {self.key: value}
        for name in reversed(self.table.split(".") if self.table else []):
            below = {name: below}
        return merged(merged(self.around, below), {"out": str(out)})


def merged(tree: Tree, other: Tree) -> Tree:
    """`other` over `tree`, table by table."""
    below = {
        key: merged(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in other.items()
    }
    return {**tree, **below}


def places() -> Iterator[Place]:
    for table in tables():
        for key in table.keys:
            if "integer" in key.type or "number" in key.type:
                yield Place(table.path, key.name, merged(BASE, NEEDED.get(table.path, {})))
    for table_name, module in METHODS.items():
        for path, preset in functions(module).items():
            parameters = inspect.signature(preset, eval_str=True).parameters
            around = merged(BASE, GATED if "gating" in parameters else {})
            around = merged(merged(around, {table_name: {"target": path}}), NEEDED.get(path, {}))
            for name, parameter in parameters.items():
                kinds = {parameter.annotation, *get_args(parameter.annotation)}
                asked = parameter.default is not parameter.empty or name == "kilobytes"
                if asked and kinds & {int, float}:
                    yield Place(table_name, name, around)


def refuses(error: UserError, key: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400
    assert key in text, text


def stops(error: RunStopped) -> None:
    text = str(error)
    assert "\n" not in text
    assert not any(word in text for word in ("TypeError", "OverflowError", "UserError", "cannot be")), text


def build(tree: Tree) -> Experiment:
    """Everything that a run makes before its first round."""
    experiment = Experiment.from_tree(tree)
    federation = Federation.build(experiment)
    client_of(federation.first)
    build_server(federation, Ledger())
    return experiment


EVERYWHERE = pytest.mark.parametrize("place", list(places()), ids=str)


def test_there_are_many() -> None:
    assert len(list(places())) > 80


@EVERYWHERE
def test_a_config_refuses_it_or_everything_can_be_built(tmp_path: Path, place: Place) -> None:
    """Of the values that a config takes, the first two and the last are built; all of them run in the slow test."""
    taken = []
    for value in EXTREMES:
        try:
            Experiment.from_tree(place.holding(value, tmp_path))
            taken.append(value)
        except UserError as error:
            refuses(error, place.key)
    for value in [*taken[:2], *taken[2:][-1:]]:
        try:
            build(place.holding(value, tmp_path))
        except UserError as error:
            refuses(error, place.key)


@pytest.mark.slow
@EVERYWHERE
def test_a_run_refuses_it_or_takes_it(tmp_path: Path, place: Place) -> None:
    """A run may end in one line where a number that is allowed means that nobody can train with it."""
    for value in EXTREMES:
        if place.key in WORK and value in (2**31, 2**62):
            continue
        try:
            run(Experiment.from_tree(place.holding(value, tmp_path)))
        except UserError as error:
            refuses(error, place.key)
        except RunStopped as error:
            stops(error)
