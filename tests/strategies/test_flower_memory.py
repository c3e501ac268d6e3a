"""What a strategy of Flower keeps: the same in the next round as in one ServerApp, and in a resumed run; else said by name."""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import same
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as Clipping
from flwr.serverapp.strategy import FedAvg
from interruption import KillAfter, Killed
from safetensors.torch import load, save
from softmax_federation import experiment

from fl_sim import Update, UserError, run
from fl_sim.codecs import Schema
from fl_sim.communication.flower_private import RUN_ID, identified
from fl_sim.simulation import resume
from strategies.flower_method import FlowerRule
from strategies.server_step import ServerState


class Moves(FedAvg):
    """FedAvg, and then `moved` is added to every value."""

    def moved(self) -> float:
        raise NotImplementedError

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        made, metrics = super().aggregate_train(server_round, replies)
        step = np.float32(self.moved())
        return ArrayRecord({name: Array(each.numpy() + step) for name, each in (made or {}).items()}), metrics


class Flag(Moves):
    warm, mode = True, "first"

    def moved(self) -> float:
        found = 0.5 * self.warm + (self.mode == "first")
        self.warm, self.mode = False, "later"
        return found


class Deletes(Moves):
    def __init__(self) -> None:
        super().__init__()
        self.m, self.fn = 3, lambda: 2.0

    def moved(self) -> float:
        found = getattr(self, "m", 0) + (self.fn() if hasattr(self, "fn") else 0)
        vars(self).pop("m", None)
        vars(self).pop("fn", None)
        return float(found)


class InPlace(Moves):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []
        self.seen: dict[object, object] = {}
        self.same = self.history
        self.buffer = np.zeros(2)
        self.names = {"a"}

    def moved(self) -> float:
        self.history.append(1.0)
        self.seen[len(self.history)] = (1, ["x"])
        self.buffer[0] += 1
        self.names.add(str(len(self.names)))
        return len(self.same) + 10 * self.seen.get(2, (0, []))[0] + self.buffer[0] + len(self.names)  # type: ignore[index]


class Draws(Moves):
    def __init__(self) -> None:
        super().__init__()
        self.rng, self.old, self.plain = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)
        self.bits, self.torch = np.random.Generator(np.random.Philox(3)), torch.Generator().manual_seed(0)

    def moved(self) -> float:
        drawn = self.rng.normal() + self.old.normal() + self.plain.gauss(0, 1) + self.bits.normal()
        return drawn + self.rng.spawn(1)[0].normal() + float(torch.rand(1, generator=self.torch))


class Kinds(Moves):
    """An integer of many bits, a scalar and a tensor of other libraries, keys that are no text, texts that look like others."""

    def __init__(self) -> None:
        super().__init__()
        self.n: object = 1
        self.table: dict[object, object] = {}

    def moved(self) -> float:
        found = (
            float(self.n) / 2.0**70 + 2 * (1 in self.table) + 4 * ("1" in self.table) + 8 * ((2, None) in self.table)
        )  # type: ignore[arg-type]
        found += 16 * isinstance(self.table.get("a.b"), np.float32) + 32 * isinstance(self.table.get("t"), torch.Tensor)
        self.n = 2**70
        self.table = {
            1: np.ones(2),
            (2, None): float("nan"),
            "a.b": np.float32(2.5),
            "t": torch.ones(2, dtype=torch.int8),
        }
        return found


class Unchanged(Moves):
    """What no checkpoint holds may be there, as long as it stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.queue, self.fn = np.array(["x"], dtype=object), deque([1]), self.moved

    def moved(self) -> float:
        return len(self.names) + len(self.queue)


class Current(Moves):
    """Names a memory of its own as Flower's strategies name the global parameters, which their `configure_train` sets."""

    current_arrays = 0.0

    def moved(self) -> float:
        self.current_arrays += 1
        return self.current_arrays


def schema() -> Schema:
    return Schema.of({"w": torch.zeros(2)}, ["w"])


def values(rules: Iterator[FlowerRule], rounds: int = 4, sent: float = 0.0) -> list[float]:
    """The value of a model after each round, the rounds' rules being given what the checkpoint of the last one holds."""
    state, found = ServerState(schema(), schema().view(torch.zeros(2))), []
    with identified(RUN_ID):
        for _ in range(rounds):
            rule, update = next(rules), Update(schema().view(torch.full((2,), sent)), 3)
            params, memory = rule.optimise(state, rule.aggregate(state, iter([update])))
            saved = load(save({name: each.clone() for name, each in memory.items()}))
            state = ServerState(schema(), params, state.round + 1, memory=saved)
            found.append(float(params["w"][0]))
    return found


def resumed(make: Callable[[], FedAvg]) -> Iterator[FlowerRule]:
    """A new strategy in every round."""
    while True:
        yield FlowerRule(make(), make.__name__)


@pytest.mark.parametrize("make", [Flag, Deletes, InPlace, Draws, Kinds, Unchanged, Current])
def test_what_is_kept_is_there_in_the_next_round_and_after_a_resume(make: type[Moves]) -> None:
    one, rule = make(), FlowerRule(make(), make.__name__)
    in_one_server_app = [float(np.float32(one.moved())) for _ in range(4)]
    assert values(iter([rule] * 4)) == in_one_server_app
    assert values(resumed(make)) == in_one_server_app


def test_two_models_do_not_share_what_is_changed_in_place() -> None:
    rule = FlowerRule(InPlace(), "InPlace")
    alone = values(iter([rule] * 4))
    assert values(iter([rule] * 4)) == alone


def test_a_round_without_updates_forgets_nothing() -> None:
    rule = FlowerRule(Flag(), "Flag")
    state = ServerState(schema(), schema().view(torch.zeros(2)))
    with identified(RUN_ID):
        _, memory = rule.optimise(state, rule.aggregate(state, iter([Update(state.params, 3)])))
        later = ServerState(schema(), state.params, 1, memory=memory)
        other = FlowerRule(Flag(), "Flag")
        _, kept = other.optimise(later, other.aggregate(later, iter([])))
    assert kept is memory


@pytest.mark.parametrize("name", ["Flag", "Draws", "InPlace"])
def test_a_resumed_run_is_the_straight_one(name: str, tmp_path: Path) -> None:
    asked = f"strategy.target={__name__}:{name}"
    whole = run(experiment(tmp_path / "whole", asked), quiet=True)
    with pytest.raises(Killed):
        run(experiment(tmp_path / "parts", asked), KillAfter(2, 1))
    same(whole, resume(experiment(tmp_path / "parts", asked), quiet=True))


class Counts(Moves):
    """Changes what `begin` made of `self.x`, each time by `step`."""

    begin: Callable[[], object]
    step: Callable[[Counts], object]

    def __init__(self) -> None:
        super().__init__()
        self.x = type(self).begin()

    def moved(self) -> float:
        type(self).step(self)
        return 1.0


class Inner:
    def __init__(self) -> None:
        self.rng, self.count = np.random.default_rng(0), [0]


def closed() -> Callable[[], int]:
    calls: list[int] = []
    return lambda: calls.append(1) or len(calls)  # type: ignore[func-returns-value]


class Private(Moves):
    _counts: list[int] = []  # noqa: RUF012, the fault under test

    def moved(self) -> float:
        self._counts.append(1)
        return 1.0


CHANGES: dict[str, tuple[Callable[[], object], Callable[..., object]]] = {
    "deque": (deque, lambda s: s.x.append(1)),
    "Inner": (Inner, lambda s: s.x.rng.random()),
    "function": (closed, lambda s: s.x()),
    "ndarray of object": (lambda: np.array([1]), lambda s: setattr(s, "x", np.array(["a"], dtype=object))),
    "list": (lambda: [Inner()], lambda s: s.x[0].count.append(1)),
    "Linear": (lambda: torch.nn.Linear(1, 1), lambda s: s.x.weight.data.add_(1)),
    "int": (lambda: 0, lambda s: setattr(s, "x", 1 << 10_000)),
    "lock": (lambda: 0, lambda s: setattr(s, "x", threading.Lock())),
}


def loses(make: Callable[[], FedAvg], said: str, log: pytest.LogCaptureFixture, sent: float = 0.0) -> list[float]:
    """The values of a strategy that runs to its end, says once what it loses, and cannot be resumed."""
    with log.at_level(logging.WARNING, "fl_sim"):
        found = values(iter([FlowerRule(make(), "Made")] * 4), sent=sent)
    lines = [record.getMessage() for record in log.records if "cannot be resumed" in record.getMessage()]
    assert lines == [f"strategy = 'Made': keeps {said}, which a checkpoint cannot hold: this run cannot be resumed"]
    with pytest.raises(UserError, match="does not hold: it cannot be resumed; needed: --fresh"):
        values(resumed(make), sent=sent)
    return found


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_checkpoint_cannot_hold_and_changes_is_said_by_name(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    begin, step = CHANGES[kind]
    made = type("Made", (Counts,), {"begin": staticmethod(begin), "step": staticmethod(step)})
    loses(made, f"'x' as {kind}", caplog)


def test_a_model_that_a_strategy_fills_in_each_round_runs_as_in_flower(caplog: pytest.LogCaptureFixture) -> None:
    class Saves(Moves):
        """As in Flower's guide to saving checkpoints: a model takes the round's parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def moved(self) -> float:
            with torch.no_grad():
                self.net.weight += 1
            return float(self.net.weight) - self.first

        @property
        def first(self) -> float:
            return float(self.net.bias)

    torch.manual_seed(0)
    one = Saves()
    torch.manual_seed(0)
    assert loses(Saves, "'net' as Linear", caplog) == [float(np.float32(one.moved())) for _ in range(4)]


def test_what_a_class_keeps_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loses(Private, "'Private._counts' as list", caplog)


def test_what_lies_in_slots_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Slotted(Moves):
        __slots__ = ("count",)

        def moved(self) -> float:
            self.count = getattr(self, "count", 0) + 1
            return float(self.count)

    assert loses(Slotted, "'count' as int", caplog) == [1.0, 2.0, 3.0, 4.0]


def test_an_object_that_is_reached_in_two_ways_is_not_made_two(caplog: pytest.LogCaptureFixture) -> None:
    class Shares(Moves):
        def __init__(self) -> None:
            super().__init__()
            self.rng = np.random.default_rng(0)
            self.draw = self.rng.random

        def moved(self) -> float:
            return self.rng.random() + self.draw()  # of a copy of it, `draw` would know nothing

    with caplog.at_level(logging.WARNING, "fl_sim"):
        one, found = Shares(), values(iter([FlowerRule(Shares(), "Made")] * 4))
    assert found == [float(np.float32(one.moved())) for _ in range(4)]
    assert "keeps 'draw' as method, which a checkpoint cannot hold" in caplog.text
    assert "keeps 'rng' as Generator, which a checkpoint cannot hold" in caplog.text


def views_of_an_array() -> tuple[object, object]:
    flat = np.zeros(4)
    return flat, [flat[:2], flat[2:]]


def views_of_a_tensor() -> tuple[object, object]:
    flat = torch.zeros(4)
    return flat, flat.numpy()


@pytest.mark.parametrize("make", [views_of_an_array, views_of_a_tensor])
def test_views_of_one_array_are_not_made_arrays_of_their_own(
    make: Callable[[], tuple[object, object]], caplog: pytest.LogCaptureFixture
) -> None:
    class Views(Moves):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.parts = make()

        def moved(self) -> float:
            self.flat += 1  # type: ignore[operator]
            return float(self.parts[0][0] if isinstance(self.parts, list) else self.parts[0])  # type: ignore[index]

    with caplog.at_level(logging.WARNING, "fl_sim"):
        assert values(iter([FlowerRule(Views(), "Views")] * 4)) == [1.0, 2.0, 3.0, 4.0]
    assert "keeps 'flat' as" in caplog.text


def test_halves_of_one_array_are_kept() -> None:
    class Halves(Moves):
        def __init__(self) -> None:
            super().__init__()
            self.halves = [*np.zeros((2, 3))]
            self.same = self.halves[1]

        def moved(self) -> float:
            self.halves[1] += 1
            return self.same[0]

    assert values(resumed(Halves)) == [1.0, 2.0, 3.0, 4.0]


def test_what_a_wrapped_strategy_keeps_is_said_whatever_its_type(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        found = values(iter([FlowerRule(Clipping(Flag(), 0.0, 1e6, 1), "Clipping")] * 2), rounds=2, sent=1.0)
    assert found == [1.0 + 1.5, 1.0]  # only the first round's is moved
    for name, kind in (("mode", "str"), ("warm", "bool")):
        assert f"keeps 'strategy.{name}' as {kind}, which a checkpoint cannot hold" in caplog.text


def test_what_cannot_be_looked_into_is_said_before_round_1(caplog: pytest.LogCaptureFixture) -> None:
    class Reads(Moves):
        def __init__(self) -> None:
            super().__init__()
            self.steps = iter(x for x in (1.0, 2.0))

        def moved(self) -> float:
            return next(self.steps)

    with caplog.at_level(logging.WARNING, "fl_sim"):
        FlowerRule(Reads(), "Reads")
    assert "Reads'" in caplog.text
    assert "keeps 'steps', in which a change of a generator is not seen" in caplog.text


def test_a_memory_of_something_else_is_one_line() -> None:
    memory = {"m_t.w": torch.zeros(2)}
    state = ServerState(schema(), schema().view(torch.zeros(2)), 1, memory=memory)
    with identified(RUN_ID), pytest.raises(UserError, match="the checkpoint holds no memory of this strategy"):
        FlowerRule(Flag(), "Flag").aggregate(state, iter([Update(state.params, 3)]))
