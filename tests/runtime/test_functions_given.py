"""Functions and classes of a notebook in place of import paths: the same run on every engine, and known by their code."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from federation import same
from torch import nn

from fl_sim import Experiment, Report, UserError, run
from fl_sim.models import build
from fl_sim.runtime.by_value import pack
from fl_sim.simulation.identity import code_of_parts
from strategies.presets import fedavg

NOTEBOOK = """
import threading
import numpy as np
from torch import nn
from fl_sim import Update, load, local_sgd, snapshot

RATE = 0.2
lock = threading.Lock()

def rate():
    return RATE

def client(task, ctx, steps=2):
    model = load(ctx.model, task.params)
    metrics = local_sgd(model, ctx.data, ctx.loss, lr=rate(), steps=steps, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples, metrics=metrics)

def locked(task, ctx):
    with lock:
        return client(task, ctx)

class Net(nn.Module):
    def __init__(self, *, num_classes, input_shape):
        super().__init__()
        self.inner = nn.Linear(input_shape[1] * input_shape[2], num_classes)

    def forward(self, images):
        return self.inner(images.flatten(1))

def parts(labels, request):
    return np.array_split(np.arange(len(labels)), request.num_clients)
"""


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A `__main__` without a file."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(NOTEBOOK, vars(module))
    return module


def asked(notebook: ModuleType, out: Path, **keys: object) -> Experiment:
    tables: dict[str, object] = {"client": notebook.client, "model": notebook.Net, "rounds": 2, "out": str(out)}
    data = {"clients": 6, "partition": notebook.parts}
    return Experiment(**{**tables, "data": data, "cohort": {"size": 4}, "workers": {"count": 1}, **keys})


def test_inline_and_workers_run_them_alike(notebook: ModuleType, tmp_path: Path) -> None:
    inline = run(asked(notebook, tmp_path / "inline"))
    assert set(inline.params) == {"inner.weight", "inner.bias"}
    assert inline.results.accuracy.final > 0.5
    same(inline, run(asked(notebook, tmp_path / "workers", engine="workers")))
    assert Report.load(inline.folder).config["client"]["target"] == "__main__:client"


@pytest.mark.slow
def test_ray_runs_them_alike(notebook: ModuleType, tmp_path: Path) -> None:
    inline = run(asked(notebook, tmp_path / "inline"))
    same(inline, run(asked(notebook, tmp_path / "ray", engine="ray", ray={"workers": 1})))


def test_the_run_is_known_by_what_they_say(notebook: ModuleType, tmp_path: Path) -> None:
    before = code_of_parts(asked(notebook, tmp_path))
    assert {"client", "model.name", "data.partition"} <= set(before)
    notebook.RATE = 0.3
    after = code_of_parts(asked(notebook, tmp_path))
    assert {key for key in before if before[key] != after[key]} == {"client"}


def test_a_function_of_a_file_is_its_import_path() -> None:
    given = Experiment(strategy=fedavg, client={"target": notebook_like, "lr": 0.1})
    assert given.strategy.target == "strategies.presets:fedavg"
    assert (given.client.target, given.client.options) == (f"{__name__}:notebook_like", {"lr": 0.1})
    assert Experiment(model="mlp").model.name == "mlp"
    assert Experiment(model=nn.Linear, data={"source": build}).data.source == "fl_sim.models:build"


def notebook_like(task: object, ctx: object, lr: float = 0.1) -> None: ...


@pytest.mark.parametrize("made", [lambda task, ctx: None, partial(notebook_like, lr=1), nn.Identity()])
def test_what_has_no_name_is_one_line(made: object) -> None:
    with pytest.raises(UserError, match=r"Experiment: client.*needed: a function made with `def`, or a class") as said:
        Experiment(client=made)
    assert "\n" not in str(said.value)


def test_what_cannot_be_sent_is_one_line(notebook: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"__main__:locked cannot be sent to worker processes \(TypeError: .*; save it to a"
    ):
        run(asked(notebook, tmp_path, client=notebook.locked, engine="workers"))
    with pytest.raises(UserError, match="engine = 'flower' runs clients in other processes"):
        run(asked(notebook, tmp_path, engine="flower"))
    assert pack(["my_parts:f", "fedavg"]) == b""


def test_wrong_keys_of_the_constructor_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^Experiment: unknown key 'round'; did you mean 'rounds'\?$"):
        Experiment(round=3)
