"""docs/plugging_in.md is executed: every part of one's own takes effect, and a wrong one is one clear line."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fl_sim import Experiment, Report, run
from fl_sim.cli import main

PAGE = Path("docs/plugging_in.md").read_text(encoding="utf-8")
PARTS, NOTEBOOK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(CONFIG,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)

WRONG = """
import numpy as np
import torch
from torch import nn
from fl_sim.data import Data

number = 3

def returns_nothing(state, updates):
    list(updates)

def forgets_one(state, updates):
    list(updates)
    return dict(list(state.params.items())[1:])

def other_shape(state, updates):
    list(updates)
    return {name: value[:1] for name, value in state.params.items()}

def raises(state, updates):
    return state.parameters

def ones(round, mask, params, grads):
    return {name: torch.ones_like(value) for name, value in params.items()}

def stranger(round, mask, params, grads):
    return {"nobody": torch.ones(3, dtype=torch.bool)}

def twice(labels, request):
    return [np.arange(len(labels))] * request.num_clients

def too_few(labels, request):
    return [np.arange(len(labels))]

def left_out(labels, request):
    return np.array_split(np.arange(len(labels) - 1), request.num_clients)

def beyond(labels, request):
    return np.array_split(np.arange(len(labels)) + 1, request.num_clients)

def no_module(*, num_classes, in_channels, image_size, width):
    return 3

def no_classes(*, in_channels, image_size):
    return nn.Linear(1, 1)

def five(*, num_classes, in_channels, image_size, width):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 5))

def other_input(*, num_classes, in_channels, image_size, width):
    return nn.Sequential(nn.Flatten(), nn.Linear(7, num_classes))

def no_data():
    return 3

def asks(name):
    return 3

def floats():
    images = np.full((40, 1, 8, 8), np.nan)
    labels = np.arange(40) % 2
    return Data.of(images, labels, test_inputs=images, test_targets=labels, num_classes=2)

def unlabelled():
    images = np.zeros((40, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(40)
    return Data.of(images, labels, test_inputs=images, test_targets=labels, num_classes=2)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's module, and one of modules that are wrong."""
    for name, text in (
        ("my_parts", PARTS),
        ("wrong", WRONG),
        ("broken", "def f(:\n"),
        ("late", "import nowhere_at_all"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "my_parts.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def outcome(*overrides: str) -> Report:
    return run(Experiment.from_tree(tomllib.loads(CONFIG), list(overrides)))


def test_all_parts_of_ones_own_take_effect(here: Path) -> None:
    report = outcome()
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    assert report.results.density.prunable == pytest.approx(1 / 3, abs=1e-3)
    assert set(report.params) == {f"{layer}.{kind}" for layer in ("hidden", "out") for kind in ("weight", "bias")}
    assert report.results.accuracy.final > 0.9
    assert (np.count_nonzero(report.label_counts, axis=1) == 1).sum() >= 6  # of eight clients; two classes
    counted = outcome("strategy.aggregate=coverage", "name=counted")
    assert any(not torch.equal(report.params[name], counted.params[name]) for name in report.params)


def test_a_function_of_a_notebook_is_given_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    main_module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main_module)
    exec(NOTEBOOK, vars(main_module))
    report = vars(main_module)["report"]
    assert report.config["client"] == {"target": "__main__:client", "lr": 0.2}
    assert report.results.accuracy.final > 0.3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("strategy.aggregate=wrong:returns_nothing", "the aggregation rule returned NoneType, not parameters by name"),
        ("strategy.aggregate=wrong:forgets_one", "the aggregation rule returned no parameter 'hidden.weight'"),
        ("strategy.aggregate=wrong:other_shape", "of shape torch.Size([1, 64]); needed: (32, 64)"),
        ("strategy.aggregate=wrong:number", "is of type int; needed: a function"),
        ("strategy.aggregate=wrong:return_nothing", "did you mean 'returns_nothing'?"),
        ("strategy.aggregate=wronk:returns_nothing", "No module named 'wronk'; looked for here and among what"),
        ("strategy.aggregate=broken:f", "importing broken raised SyntaxError: invalid syntax (broken.py, line 1)"),
        ("strategy.aggregate=late:f", "No module named 'nowhere_at_all'"),
        ("strategy.aggregate=medan", "unknown; did you mean 'median'?"),
        ("strategy.mask_rule=wrong:ones", "the mask rule returned 'hidden.weight' that is no tensor of bool"),
        ("strategy.mask_rule=wrong:stranger", "the mask rule: mask of names that are not prunable: nobody"),
        ("strategy.mask_rule=a_third", "'a_third' is no import path; write 'module:name'"),
        ("data.partition=wrong:twice", "sample 0 is in 8 parts; needed: each of 360 in exactly one"),
        ("data.partition=wrong:too_few", "returned 1 parts; needed: a list of 8 index arrays"),
        ("data.partition=wrong:left_out", "sample 359 is in 0 parts"),
        ("data.partition=wrong:beyond", "a part holds position 360; there are 360 samples"),
        ("model.name=wrong:no_module", "returned int, not a torch.nn.Module"),
        ("model.name=wrong:no_classes", "unexpected keyword argument 'num_classes'; it is called with num_classes"),
        ("model.name=wrong:five", "answers (2, 5) to 2 images; needed: (2, 2)"),
        ("model.name=wrong:other_input", "mat1 and mat2 shapes cannot be multiplied"),
        ("data.source=wrong:no_data", "returned int, not fl_sim.data.Data"),
        ("data.source=wrong:asks", "missing a required argument: 'name'"),
        ("data.source=wrong:floats", "inputs hold NaN or infinity, first in sample 0"),
        ("data.source=wrong:unlabelled", "targets: classes go from 0 to 1; found 0 to 39"),
    ],
)
def test_a_wrong_part_is_one_line_and_status_2(
    override: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fl-sim", "run", "my_parts.toml", "rounds=1", override])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert (ended.value.code, len(said.strip().splitlines())) == (2, 1), said
    assert expected in said


def test_a_part_that_raises_is_one_line_with_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fl-sim", "run", "my_parts.toml", "strategy.aggregate=wrong:raises"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    line = WRONG.splitlines().index("    return state.parameters") + 1
    assert ended.value.code == 2  # tried before round 1
    where = rf"\(wrong\.py, line {line}\)"
    expected = rf"fl-sim: strategy.aggregate: on two updates of the first model it raised AttributeError: .* {where}\n"
    assert re.fullmatch(expected, said), said
