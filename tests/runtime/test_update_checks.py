"""What a client returns and keeps: what is clear is taken, all else is one line that names it, and the check is cheap."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from federation import tiny
from torch import Tensor, nn

from fl_sim import Report, run
from fl_sim.codecs import Schema
from fl_sim.core.types import FlatMask, FlatParams, Mask, Params, Update
from fl_sim.models import build, prunable_names
from fl_sim.models.parameters import snapshot
from fl_sim.runtime.client.update_validation import BadUpdate, checked, kept


class Net(nn.Module):
    """Two weights, and a counter that does not travel."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.b = nn.Parameter(torch.ones(2))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))


MODEL = Net()
SCHEMA = Schema.of({"w": torch.zeros(2, 3), "b": torch.zeros(2)}, ["w"])
GOOD = Update({"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, 5, {"w": torch.ones(2, 3) > 0}, {"loss": 1.5})


def check(**changed: object) -> Update:
    update = replace(GOOD, **changed)  # type: ignore[arg-type]  # what a user's untyped client returns
    return checked(update, SCHEMA, lambda: MODEL.state_dict().keys())


def refused(said: str, **changed: object) -> None:
    with pytest.raises(BadUpdate) as told:
        check(**changed)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_good_update_passes_as_it_is() -> None:
    flat = FlatParams.pack(GOOD.params)
    assert check(params=flat).params is flat
    assert check().mask is GOOD.mask
    update = Update(flat, 5, FlatMask.pack(cast(Mask, GOOD.mask)), {"loss": 1.0, "steps": 3})
    assert checked(update, SCHEMA, MODEL.state_dict) is update


@pytest.mark.parametrize("examples", [np.int64(5), np.uint8(5), torch.tensor(5), torch.tensor(5, dtype=torch.int32)])
def test_whole_numbers_of_every_kind_are_examples(examples: object) -> None:
    found = check(num_examples=examples).num_examples
    assert (type(found), found) == (int, 5)


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (None, "num_examples is None"),
        ("5", "num_examples is str '5'"),
        (5.0, "num_examples is float 5.0"),
        (np.float32(5), "num_examples is float32"),
        (torch.tensor(5.0), "num_examples is a Tensor of torch.float32"),
        (torch.tensor([5]), "num_examples is a Tensor of torch.int64, shape (1,)"),
        (True, "num_examples is bool True"),
        ([5], "num_examples is list [5]"),
        (0, "at least 1"),
        (np.int64(-3), "at least 1"),
        (2**31, "below 2**31"),
    ],
)
def test_other_examples_are_refused_by_name(examples: object, said: str) -> None:
    refused(said, num_examples=examples)


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5, requires_grad=True)]
)
def test_numbers_of_every_kind_are_metrics(value: object) -> None:
    found = check(metrics={"auc": value}).metrics["auc"]
    assert (type(found), found) == (float, 0.5)


def test_metrics_that_are_clear_are_taken() -> None:
    assert check(metrics=None).metrics == {}
    assert check(metrics={"hits": np.int32(3), "won": True, "big": 2**70}).metrics == {
        "hits": 3,
        "won": 1,
        "big": 2.0**70,
    }
    assert type(check(metrics={"won": np.bool_(True)}).metrics["won"]) is int
    assert np.isnan(check(metrics={"auc": float("nan")}).metrics["auc"])


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"loss": 1.0, "auc": [0.5]}, "metric 'auc' is list [0.5]"),
        ({"auc": None}, "metric 'auc' is None"),
        ({"auc": "0.5"}, "metric 'auc' is str '0.5'"),
        ({"auc": torch.ones(1)}, "metric 'auc' is a Tensor of torch.float32, shape (1,)"),
        ({"auc": np.ones(2)}, "metric 'auc' is a ndarray of float64, shape (2,)"),
        ({"auc": 1j}, "metric 'auc' is complex 1j"),
        ({"auc": {"a": 1}}, "metric 'auc' is dict"),
        ({"huge": 10**400}, "metric 'huge' is int"),
        ({3: 1.0}, "metric name 3"),
        ({"num-examples": 7}, "metric name 'num-examples'"),
        ([("auc", 1.0)], "metrics is list"),
        (0.5, "metrics is float 0.5"),
    ],
)
def test_other_metrics_are_refused_by_name(metrics: object, said: str) -> None:
    refused(said, metrics=metrics)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: {n: v.numpy() for n, v in p.items()},
        lambda p: {n: v.double().numpy() for n, v in p.items()},
        lambda p: {n: v.numpy().astype(">f4") for n, v in p.items()},
        lambda p: {n: np.asfortranarray(v.numpy()) for n, v in p.items()},
        lambda p: {n: v.numpy()[::-1].copy()[::-1] for n, v in p.items()},
        lambda p: {n: np.frombuffer(v.numpy().tobytes(), np.float32).reshape(v.shape) for n, v in p.items()},
        lambda p: {n: v.bfloat16() for n, v in p.items()},
        lambda p: {n: v.clone().requires_grad_() for n, v in p.items()},
        lambda p: MODEL,
        lambda p: MODEL.state_dict(),
        lambda p: snapshot(MODEL),
        lambda p: FlatParams.pack({n: v.double() for n, v in p.items()}),
    ],
)
def test_parameters_in_every_clear_form_are_the_same(make: Callable[[Params], object]) -> None:
    found = check(params=make(GOOD.params))
    assert torch.equal(SCHEMA.flat(found.params), SCHEMA.flat(GOOD.params))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ([torch.zeros(2, 3), torch.zeros(2)], "params is a list; needed: a dict of tensors by name"),
        (None, "params is a NoneType"),
        (torch.zeros(8), "params is a Tensor"),
        ({"w": torch.zeros(2, 3)}, "lacks parameter 'b'; return fl_sim.snapshot(model)"),
        (
            {f"_orig_mod.{name}": value for name, value in GOOD.params.items()},
            "lacks parameter 'w'; take ctx.model itself, not what torch.compile, DataParallel or AveragedModel made",
        ),
        ({**GOOD.params, "c.delta": torch.zeros(3)}, "a parameter 'c.delta' that the model does not have"),
        ({**GOOD.params, "w": torch.zeros(3, 2)}, "parameter 'w' has shape (3, 2), not (2, 3)"),
        ({**GOOD.params, "w": [[0.0] * 3] * 2}, "parameter 'w' is list"),
        ({**GOOD.params, "b": 1.0}, "parameter 'b' is float 1.0"),
        ({**GOOD.params, "b": np.array(["a", "b"])}, "parameter 'b' is a ndarray of <U1"),
        ({**GOOD.params, "b": torch.zeros(2, dtype=torch.complex64)}, "parameter 'b' is torch.complex64"),
        ({**GOOD.params, "b": torch.zeros(2).to_sparse()}, "parameter 'b' is torch.float32, torch.sparse_coo"),
    ],
)
def test_other_parameters_are_refused_by_name(params: object, said: str) -> None:
    refused(said, params=params)


ALIVE = torch.tensor([[True, False, True], [False, False, True]])


@pytest.mark.parametrize(
    "part",
    [ALIVE.float(), ALIVE.double(), ALIVE.to(torch.uint8), ALIVE.numpy(), ALIVE.numpy().astype(np.float32)],
)
def test_a_mask_of_zeros_and_ones_is_a_mask(part: object) -> None:
    found = check(mask={"w": part}).mask
    assert found is not None
    assert found["w"].dtype == torch.bool
    assert torch.equal(found["w"], ALIVE)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ({"w": torch.full((2, 3), 0.5)}, "the mask of 'w' is a Tensor of torch.float32, shape (2, 3) and holds other"),
        ({"w": torch.full((2, 3), torch.nan)}, "holds other numbers than 0 and 1"),
        ({"w": ALIVE[:1]}, "the mask of 'w' has shape (1, 3), not (2, 3)"),
        ({"b": torch.ones(2) > 0}, "mask of 'b', which is not prunable"),
        ({"w": [True] * 6}, "the mask of 'w' is list"),
        ({"w": None}, "the mask of 'w' is None"),
        (ALIVE, "mask is a Tensor of torch.bool"),
    ],
)
def test_other_masks_are_refused_by_name(mask: object, said: str) -> None:
    refused(said, mask=mask)


def test_what_is_clear_is_kept_as_tensors() -> None:
    state = {
        "ratio": 0.1,
        "count": 3,
        "seen": True,
        "array": np.arange(3.0),
        "scalar": np.float32(2),
        "half": torch.ones(2, dtype=torch.float16),
        "grad": torch.ones(2, requires_grad=True),
    }
    found = kept(state)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in found.items()} == {
        "ratio": (torch.float64, ()),
        "count": (torch.int64, ()),
        "seen": (torch.bool, ()),
        "array": (torch.float64, (3,)),
        "scalar": (torch.float32, ()),
        "half": (torch.float16, (2,)),
        "grad": (torch.float32, (2,)),
    }
    assert float(found["ratio"]) == 0.1


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"history": {"a": 1}}, "ctx.state['history'] is dict {'a': 1}; allowed: tensors, NumPy arrays and numbers"),
        ({"history": [1.0]}, "ctx.state['history'] is list"),
        ({"name": "x"}, "ctx.state['name'] is str"),
        ({"nothing": None}, "ctx.state['nothing'] is None"),
        ({"w": torch.ones(2, dtype=torch.bfloat16)}, "ctx.state['w'] is torch.bfloat16"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "ctx.state['w'] is torch.complex64"),
        ({"w": torch.ones(2).to_sparse()}, "ctx.state['w'] is torch.float32, torch.sparse_coo"),
        ({"w": np.array(["a"])}, "ctx.state['w'] is a ndarray"),
        ({"n": 2**70}, "ctx.state['n'] is int"),
        ({"w": np.ma.masked_array(np.ones(3), [0, 1, 0])}, "ctx.state['w'] is"),
        ({"n": np.ma.masked}, "ctx.state['n'] is"),
        ({3: torch.ones(1)}, "ctx.state has the key 3"),
        (None, "ctx.state is None"),
    ],
)
def test_other_state_is_refused_by_name(state: object, said: str) -> None:
    with pytest.raises(BadUpdate) as told:
        kept(state)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_the_check_of_a_normal_update_takes_microseconds() -> None:
    model = build("resnet20", num_classes=10, in_channels=3, image_size=32)
    schema = Schema.of(snapshot(model), prunable_names(model))
    params = schema.view(schema.flat(snapshot(model)))
    mask = schema.view_mask(torch.ones(schema.prunable_size, dtype=torch.bool))
    update = Update(params, 100, mask, {"loss": 1.0, "accuracy": 0.5, "steps": 20, "examples": 100})
    spent = []
    for _ in range(200):
        start = time.perf_counter()
        assert checked(update, schema, model.state_dict) is update
        kept({})
        spent.append(time.perf_counter() - start)
    assert min(spent) < 50e-6


CLIENTS = """
import numpy as np
import torch
from fl_sim import Update, load, snapshot
from fl_sim.training import local_sgd

def trained(task, ctx):
    load(ctx.model, task.params)
    return local_sgd(ctx.model, ctx.data, lr=0.1, steps=2, rng=ctx.rng)

def plain(task, ctx):
    metrics = trained(task, ctx)
    ctx.state["count"] = ctx.state.get("count", torch.tensor(0)) + 1
    told = {"auc": 0.25, "rounds": int(ctx.state["count"])}
    return Update(snapshot(ctx.model), ctx.num_examples, None, {**metrics, **told})

def numpy_throughout(task, ctx):
    metrics = trained(task, ctx)
    ctx.state["count"] = int(ctx.state.get("count", 0)) + 1
    told = {"auc": torch.tensor(0.25), "rounds": np.int64(ctx.state["count"])}
    params = {name: value.numpy() for name, value in snapshot(ctx.model).items()}
    return Update(params, np.int64(ctx.num_examples), None, {**metrics, **told})

def the_module(task, ctx):
    metrics = trained(task, ctx)
    ctx.state["count"] = np.int32(ctx.state.get("count", 0)) + 1
    return Update(ctx.model, torch.tensor(ctx.num_examples), None, {**metrics, "auc": 0.25, "rounds": ctx.state["count"]})

def stranger(task, ctx):
    return Update({**snapshot(ctx.model), "c.delta": torch.ones(2)}, ctx.num_examples)

def lists(task, ctx):
    return Update(snapshot(ctx.model), ctx.num_examples, None, {"curve": [1.0, 2.0]})

def keeps_text(task, ctx):
    ctx.state["note"] = "x"
    return Update(snapshot(ctx.model), ctx.num_examples)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    (tmp_path / "checked_clients.py").write_text(CLIENTS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def outcome(name: str, *overrides: str) -> Report:
        return run(tiny(tmp_path, f"client=checked_clients:{name}", f"name={name.replace('_', '-')}", *overrides))

    return outcome


def test_a_run_of_what_is_clear_equals_the_plain_one(own: Callable[..., Report]) -> None:
    reports = [own(name) for name in ("plain", "numpy_throughout", "the_module")]
    assert len({report.summary["params_sha256"] for report in reports}) == 1
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in report.rounds] for report in reports]
    assert rows[0] == rows[1]
    assert rows[0][0]["train_auc"] == rows[2][0]["train_auc"] == 0.25
    assert all(report.summary["failures"] == reports[0].summary["failures"] for report in reports)


@pytest.mark.parametrize(
    ("client", "said"),
    [
        ("stranger", "a parameter 'c.delta' that the model does not have"),
        ("lists", "metric 'curve' is list [1.0, 2.0]; needed: one number"),
        ("keeps_text", "ctx.state['note'] is str 'x'"),
    ],
)
def test_a_run_says_in_one_line_which_client_and_what(own: Callable[..., Report], client: str, said: str) -> None:
    with pytest.raises(Exception, match=r"round 1: none of 3 clients .*: client \d: BadUpdate: ") as told:
        own(client)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_tensor_is_not_copied() -> None:
    own: Tensor = torch.ones(3)
    assert kept({"w": own})["w"] is own


@pytest.mark.parametrize("where", ["params", "mask", "metrics"])
def test_masked_values_are_not_shown_as_values(where: str) -> None:
    """`np.asarray` drops a mask, and `np.ma.masked.item()` is 0.0."""
    model = build("mlp", num_classes=10, in_channels=1, image_size=8)
    own = snapshot(model)
    name = next(iter(own))
    masked = np.ma.masked_array(np.ones(own[name].shape), mask=np.eye(*own[name].shape, dtype=bool))
    parts: dict[str, object] = {
        "params": {**own, name: masked},
        "mask": {name: masked},
        "metrics": {"auc": np.ma.masked},
    }
    update = replace(Update(own, 10), **{where: parts[where]})
    with pytest.raises(BadUpdate, match=r"(?i)masked"):
        checked(update, Schema.of(own, prunable_names(model)), model.state_dict)
