"""What a user's client keeps between calls outside of ctx.state is named during a run; what it only reads is not."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from clients.presets import fedavg
from fl_sim import Task, Update
from fl_sim.core.process_state import entered_modes, restore, settings
from fl_sim.runtime.client.kept_between_calls import CALLS, Watch
from fl_sim.training import Training
from fl_sim.training.client import ClientContext

COUNT = 0
SEEN: list[int] = []
LAST = torch.zeros(3)
ARRAY = np.zeros(3)
RANDOM = random.Random(0)
NUMBERS = itertools.count()
MODEL = nn.Linear(2, 2)
TABLE: dict[str, list[float]] = {"a": [0.0]}


class Box:
    """An object of the user's in a module global."""

    value = 0


BOX = Box()


def counts() -> None:
    global COUNT
    COUNT += 1


def weights() -> None:
    with torch.no_grad():
        MODEL.weight.add_(1.0)


def deep() -> None:
    TABLE["a"][0] += 1


def boxed() -> None:
    BOX.value += 1


def on_a_class() -> None:
    Box.value += 1


KEEPING: dict[str, Callable[[], object]] = {
    "COUNT": counts,
    "SEEN": lambda: SEEN.append(0),
    "LAST": lambda: LAST.add_(1.0),
    "ARRAY": lambda: np.add(ARRAY, 1.0, out=ARRAY),
    "RANDOM": RANDOM.random,
    "NUMBERS": lambda: next(NUMBERS),
    "MODEL": weights,
    "TABLE": deep,
    "BOX": boxed,
    "Box": on_a_class,
}


def client(task: object = None, ctx: object = None) -> None:
    """A client whose keeping is done by the tests."""


@pytest.mark.parametrize("name", KEEPING)
def test_what_changes_in_a_module_is_named(name: str) -> None:
    watch = Watch.of(client)
    assert watch is not None
    said = []
    for _ in range(3):
        KEEPING[name]()
        said.append(watch.called())
    assert said[0] == ""
    assert f"{__name__}.{name} is another one after each call" in said[1]
    assert watch.done


def test_what_changes_on_the_client_itself_is_named() -> None:
    class Own:
        calls = 0

        def __call__(self, task: object, ctx: object) -> None:
            self.calls += 1

    def enclosing() -> Callable[[object, object], None]:
        count = 0

        def inner(task: object, ctx: object) -> None:
            nonlocal count
            count += 1
            inner.last = count  # type: ignore[attr-defined]

        return inner

    own = Own()
    for each, place in ((own, "Own.calls"), (own.__call__, "Own.calls"), (enclosing(), "count"), (partial(own), "Own")):
        watch = Watch.of(each)
        assert watch is not None
        said = ""
        for _ in range(3):
            each(None, None)
            said = said or watch.called()
        assert place.split(".")[-1] in said or "last" in said


def test_what_the_first_call_sets_up_and_later_ones_read_is_not_named() -> None:
    SEEN.append(1)
    watch = Watch.of(client)
    assert watch is not None
    assert [watch.called() for _ in range(CALLS)] == [""] * CALLS
    assert watch.done


def test_clients_of_this_package_are_not_looked_at() -> None:
    assert Watch.of(fedavg(training=Training())) is None


ROUNDS: list[int] = []


def leaking(task: Task, ctx: ClientContext) -> Update:
    """Moves the weights by the number of calls of its process so far."""
    ROUNDS.append(task.round)
    return Update({n: p + 1e-3 * len(ROUNDS) for n, p in task.params.items()}, ctx.num_examples)


def keeping_to_itself(task: Task, ctx: ClientContext) -> Update:
    return Update({n: p + 1e-3 for n, p in task.params.items()}, ctx.num_examples)


@pytest.mark.parametrize(("name", "named"), [("leaking", True), ("keeping_to_itself", False)])
def test_a_run_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, named: bool) -> None:
    with caplog.at_level(logging.WARNING):
        run_tiny(tmp_path, f"client={__name__}:{name}", "model.name=mlp", "rounds=2")
    lines = [record.getMessage() for record in caplog.records if "after each call" in record.getMessage()]
    assert len(lines) == named
    assert all(f"{__name__}.ROUNDS" in line for line in lines)


PASSES: list[int] = []


class Passing(nn.Module):
    """A model whose weight grows with the passes of its process."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        PASSES.append(1)
        return (1 + 0.01 * len(PASSES)) * self.fc(x.flatten(1))


def passing(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """The builder."""
    return Passing()


def test_what_a_model_keeps_in_a_global_of_its_module_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run_tiny(tmp_path, f"model.name={__name__}:passing", "rounds=2")
    lines = [record.getMessage() for record in caplog.records if "after each call" in record.getMessage()]
    assert len(lines) == 1
    assert f"{__name__}.PASSES" in lines[0]


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def test_modes_that_were_entered_and_numpys_errors_are_put_back() -> None:
    before = settings()
    Dispatch().__enter__()
    Functions().__enter__()
    torch.set_default_device("meta")
    Functions().__enter__()
    np.seterr(all="raise", under="ignore")
    assert settings() != before
    restore(before)
    assert settings() == before
    assert entered_modes() == (0, 0)
    assert torch.zeros(1).device.type == "cpu"
    assert np.geterr()["divide"] == "warn"


class Unreadable(set[int]):
    """A container of the user's that must not be read."""

    def __iter__(self) -> Iterator[int]:
        raise RuntimeError("closed")


class Holder:
    """A client that holds one."""

    def __init__(self) -> None:
        self.box = Unreadable()

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        return fedavg(training=Training(steps=1))(task, ctx)


def test_an_object_that_cannot_be_read_is_said_once() -> None:
    watch = Watch.of(Holder())
    assert watch is not None
    said = watch.called()
    assert "cannot be looked at (RuntimeError: closed" in said
    assert "\n" not in said
    assert watch.done
