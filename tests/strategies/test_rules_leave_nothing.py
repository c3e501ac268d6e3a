"""What a rule of the server changes in the process reaches neither the next client nor the rest of the program."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny, same
from updates import mask, params, state

from fl_sim.core.process_state import settings
from fl_sim.core.types import Params, Update, UserError
from fl_sim.data import Data, partition
from fl_sim.data.own import load_own
from fl_sim.simulation.loop import RunStopped
from strategies.server_step import ServerState, server_step
from strategies.trials import attempt

CHANGES: dict[str, Callable[[], object]] = {
    "gradients": lambda: torch.set_grad_enabled(False),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "folder": lambda: os.chdir("/"),
    "environment": lambda: os.environ.update(LEFT="1"),
    "collector": gc.disable,
    "log": lambda: logging.disable(logging.CRITICAL),
    "recursion": lambda: sys.setrecursionlimit(3000),
    "errors of numpy": lambda: np.seterr(all="ignore"),
}


def average(state: ServerState, updates: Iterable[Update]) -> Params:
    arrived = [update.params for update in updates]
    return {name: torch.stack([each[name] for each in arrived]).mean(dim=0) for name in state.params}


@torch.no_grad()
def without_gradients(state: ServerState, updates: Iterable[Update]) -> Params:
    return average(state, updates)


def in_inference(state: ServerState, updates: Iterable[Update]) -> Params:
    with torch.inference_mode():
        made = average(state, updates)
    return {name: value.clone() for name, value in made.items()}


@contextmanager
def nothing_left() -> Iterator[None]:
    before = settings()
    yield
    assert settings() == before


each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@each_change
def test_aggregation_and_mask_rule(change: Callable[[], object]) -> None:
    def aggregate(state: ServerState, updates: Iterable[Update]) -> Params:
        change()
        return average(state, updates)

    def adjust(number: int, old: object, weights: Params, grads: object) -> object:
        change()
        return mask(1)

    updates = [Update(params(1), 1), Update(params(2), 1)]
    with nothing_left():
        server_step(state(), iter(updates), aggregate=aggregate, adjust_mask=adjust)  # type: ignore[arg-type]
    with nothing_left():
        attempt({"aggregate": aggregate, "mask_rule": adjust}, state().schema, state().params)


@each_change
def test_partition_and_data_source(change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(40) % 2

    def split(labels: object, request: object) -> list[object]:
        change()
        return [np.arange(20), np.arange(20, 40)]

    def source() -> Data:
        change()
        images = np.zeros((40, 1, 8, 8), dtype=np.uint8)
        return Data.of(images, labels, test_inputs=images, test_targets=labels)

    monkeypatch.setattr(sys.modules[__name__], "PARTS", (split, source), raising=False)
    with nothing_left():
        partition(labels, 2, kind=f"{__name__}:the_split", min_size=1)
    with nothing_left():
        load_own(f"{__name__}:the_source", validation=0.1, proxy=0.0)


def the_split(labels: object, request: object) -> object:
    return PARTS[0](labels, request)  # type: ignore[name-defined]  # noqa: F821


def the_source() -> object:
    return PARTS[1]()  # type: ignore[name-defined]  # noqa: F821


ROUNDS: list[int] = []


def counting(state: ServerState, updates: Iterable[Update]) -> Params:
    ROUNDS.append(state.round)
    return average(state, updates)


def test_what_a_rule_keeps_between_rounds_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_tiny(tmp_path, f"strategy.aggregate={__name__}:counting", "rounds=4", "model.name=mlp", "training.steps=1")
    said = f"strategy: {__name__}.ROUNDS is another one after each call of a rule of the server"
    assert [record.getMessage().startswith(said) for record in caplog.records].count(True) == 1
    caplog.clear()
    run_tiny(tmp_path, f"strategy.aggregate={__name__}:average", "rounds=2", "model.name=mlp", "training.steps=1")
    assert "another one" not in caplog.text


HISTORY: list[Params] = []
KEPT: dict[str, object] = {"calls": 0, "mean": torch.zeros(2)}
CALLS = 0


class Momentum:
    """Keeps what it made on itself."""

    def __init__(self) -> None:
        self.made: list[Params] = []

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        self.made.append(average(state, updates))
        return self.made[-1]


def remembering(state: ServerState, updates: Iterable[Update]) -> Params:
    global CALLS
    CALLS += 1
    KEPT["calls"] = CALLS
    KEPT["mean"].add_(1)  # type: ignore[attr-defined]
    KEPT[f"of round {state.round}"] = state.params
    remembering.last = state.round  # type: ignore[attr-defined]
    HISTORY.append(average(state, updates))
    return HISTORY[-1]


def test_the_trial_of_a_rule_leaves_nothing_in_its_module(caplog: pytest.LogCaptureFixture) -> None:
    closed, kept = [], Momentum()

    def closing(state: ServerState, updates: Iterable[Update]) -> Params:
        closed.append(state.round)
        return average(state, updates)

    for rule in (remembering, closing, kept):
        attempt({"aggregate": rule}, state().schema, state().params)
    assert (HISTORY, closed, kept.made, CALLS, KEPT["calls"], len(KEPT)) == ([], [], [], 0, 0, 2)
    assert torch.equal(KEPT["mean"], torch.zeros(2))  # type: ignore[arg-type]
    assert not hasattr(remembering, "last")
    assert "cannot be taken back" not in caplog.text


def test_the_first_round_of_a_rule_that_remembers_is_its_first_call(tmp_path: Path) -> None:
    HISTORY.clear()
    run_tiny(tmp_path, f"strategy.aggregate={__name__}:remembering", "rounds=2", "model.name=mlp", "training.steps=1")
    assert len(HISTORY) == 2


def test_a_trial_that_cannot_be_taken_back_is_said(caplog: pytest.LogCaptureFixture) -> None:
    numbers, made = iter(range(9)), []  # what an iterator has given cannot be put back

    def drawing(state: ServerState, updates: Iterable[Update]) -> Params:
        made.append(next(numbers))
        return average(state, updates)

    attempt({"aggregate": drawing}, state().schema, state().params)
    assert "strategy.aggregate: its trial before round 1 cannot be taken back: " in caplog.text
    assert "made of the enclosing function is another one" in caplog.text


def misreading(state: ServerState, updates: Iterable[Update]) -> Params:
    weights = [update.metrics["nope"] for update in updates]
    return {name: value * sum(weights) / len(weights) for name, value in state.params.items()}


def test_a_rule_that_fails_in_a_round_is_named(tmp_path: Path) -> None:
    said = (
        r"round 1: the aggregation rule \(strategy.aggregate\) raised KeyError: 'nope' \(test_rules_leave_nothing.py, line \d+\); "
        "metrics that its clients report: .*loss"
    )
    with pytest.raises(RunStopped, match=said):
        run_tiny(tmp_path, f"strategy.aggregate={__name__}:misreading", "model.name=mlp", "training.steps=1")


def test_what_receiving_raises_is_not_blamed_on_the_rule() -> None:
    def broken() -> Iterator[Update]:
        yield Update(params(1), 1)
        raise RuntimeError("no client is left")

    with pytest.raises(RuntimeError, match=r"^no client is left$"):
        server_step(state(), broken(), aggregate=average)


def test_a_mask_rule_that_fails_in_a_round_is_named() -> None:
    def fails(number: int, old: object, weights: Params, grads: object) -> object:
        return old.nope  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match=r"^round 1: the mask rule \(strategy.mask_rule\) raised AttributeError: "):
        server_step(state(), iter([Update(params(1), 1)]), aggregate=average, adjust_mask=fails)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^strategy.mask_rule: on the first model it raised AttributeError: "):
        attempt({"mask_rule": fails}, state().schema, state().params)


@pytest.mark.parametrize("rule", ["average", "without_gradients", "in_inference"])
def test_a_rule_without_gradients_reads_clients_that_train(tmp_path: Path, rule: str) -> None:
    """On the inline engine, the next client trains while the rule waits for its update."""
    same(
        *(
            run_tiny(tmp_path / engine, f"strategy.aggregate={__name__}:{rule}", "rounds=1", "model.name=mlp", *options)
            for engine, options in (("inline", ()), ("workers", ("engine=workers", "workers.count=1")))
        )
    )


def test_a_rule_that_draws_from_global_generators_draws_the_same_in_every_run() -> None:
    def noisy(state: ServerState, updates: Iterable[Update]) -> Params:
        noise = float(np.random.rand())  # noqa: NPY002 - what a user may write
        return {name: value + torch.rand_like(value) + noise for name, value in average(state, updates).items()}

    def drawn(seed: int) -> ServerState:
        torch.manual_seed(int(gc.get_count()[0]))
        return server_step(state(seed), iter([Update(params(1), 1)]), aggregate=noisy)

    one, again, other = drawn(99), drawn(99), drawn(98)
    assert torch.equal(one.params["conv.weight"], again.params["conv.weight"])
    assert not torch.equal(one.params["conv.weight"], other.params["conv.weight"])


def test_a_rule_that_exits_is_an_error_of_the_run() -> None:
    def leaves(state: ServerState, updates: Iterable[Update]) -> Params:
        sys.exit(3)

    with pytest.raises(RuntimeError, match=r"a rule of the server called sys.exit\(3\)"):
        server_step(state(), iter([]), aggregate=leaves)
    with pytest.raises(UserError, match=r"strategy.aggregate: on two updates .* SystemExit"):
        attempt({"aggregate": leaves}, state().schema, state().params)


def test_a_mask_without_a_weight_alive_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def nothing(number: int, old: object, weights: Params, grads: object) -> object:
        return {name: torch.zeros_like(value, dtype=torch.bool) for name, value in weights.items()}

    server_step(state(), iter([Update(params(1), 1)]), aggregate=average, adjust_mask=nothing)  # type: ignore[arg-type]
    assert "round 1: the mask leaves no weight alive" in caplog.text
