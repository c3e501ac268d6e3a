"""A rule of one's own over the updates: read once, changed in place, left unread; metrics that not every client reports."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from federation import FOUR, tiny

from fl_sim import Report, run
from fl_sim.codecs import Schema
from fl_sim.core.files import as_json
from fl_sim.core.types import Grads, Mask, Params, Update, UserError
from strategies.aggregation import coverage_mean
from strategies.robust import ClipNorm
from strategies.round_log import RoundLog
from strategies.server_step import Momentum, ServerState, replace_params, server_step


def params(value: float) -> Params:
    return {"w": torch.full((2, 2), value), "b": torch.full((2,), value)}


SCHEMA = Schema.of(params(0.0), ["w"])


def state() -> ServerState:
    return ServerState(SCHEMA, SCHEMA.view(SCHEMA.flat(params(0.0))))


def updates() -> Iterator[Update]:
    return (Update(params(float(k)), k) for k in (1, 2, 3))


def mean(state: ServerState, received: Iterable[Update]) -> Params:
    kept = [update.params for update in received]
    return {name: torch.stack([each[name] for each in kept]).mean(dim=0) for name in state.params}


def counts_first(state: ServerState, received: Iterable[Update]) -> Params:
    total = sum(update.num_examples for update in received)
    new = {name: torch.zeros_like(value) for name, value in state.params.items()}
    for update in received:
        for name in new:
            new[name] += update.params[name] * update.num_examples / total
    return new


def by_comprehension(state: ServerState, received: Iterable[Update]) -> Params:
    total = sum([update.num_examples for update in received])
    parts = [(update.params, update.num_examples / total) for update in received]
    return {name: sum((p[name] * share for p, share in parts), torch.zeros(())) for name in state.params}


def list_after_loop(state: ServerState, received: Iterable[Update]) -> Params:
    for _ in received:
        pass
    return mean(state, list(received))


@pytest.mark.parametrize("rule", [counts_first, by_comprehension, list_after_loop])
@pytest.mark.parametrize("around", [lambda rule: rule, lambda rule: ClipNorm(100.0, rule)], ids=["alone", "clipped"])
def test_a_second_pass_over_the_updates_is_an_error(
    rule: Callable[[ServerState, Iterable[Update]], Params],
    around: Callable[[Callable[[ServerState, Iterable[Update]], Params]], Callable[..., Params]],
) -> None:
    with pytest.raises(UserError, match=r"reads `updates` a second time.*read once") as told:
        server_step(state(), updates(), aggregate=around(rule))
    assert "\n" not in str(told.value)


def test_one_pass_in_several_steps_is_none(caplog: pytest.LogCaptureFixture) -> None:
    def first_apart(state: ServerState, received: Iterable[Update]) -> Params:
        stream = iter(received)
        first = next(stream)
        return mean(state, [first, *stream])

    new = server_step(state(), updates(), aggregate=first_apart)
    assert torch.equal(new.params["w"], torch.full((2, 2), 2.0))
    assert not caplog.records


def test_what_a_rule_leaves_unread_is_read_and_said(caplog: pytest.LogCaptureFixture) -> None:
    read = []

    def stream() -> Iterator[Update]:
        for update in updates():
            read.append(update.num_examples)
            yield update

    new = server_step(state(), stream(), aggregate=lambda state, received: next(iter(received)).params)
    assert torch.equal(new.params["w"], torch.ones(2, 2))
    assert read == [1, 2, 3]
    assert "did not read 2 of the round's updates" in caplog.text


def adds_in_place(state: ServerState, received: Iterable[Update]) -> Params:
    for name, value in mean(state, received).items():
        state.params[name].add_(value - state.params[name])
    return state.params


def assigns(state: ServerState, received: Iterable[Update]) -> Params:
    for name, value in mean(state, received).items():
        state.params[name] = value
    return state.params


def through_numpy(state: ServerState, received: Iterable[Update]) -> Params:
    for name, value in mean(state, received).items():
        state.params[name].numpy()[...] = value.numpy()
    return state.params


@pytest.mark.parametrize("rule", [adds_in_place, assigns, through_numpy])
@pytest.mark.parametrize("flat", [True, False])
def test_a_rule_that_changes_the_state_in_place_equals_one_that_does_not(
    rule: Callable[[ServerState, Iterable[Update]], Params], flat: bool
) -> None:
    for optimise in (replace_params, Momentum(1.0, 0.9), Momentum(0.5)):
        old = state() if flat else replace(state(), params=params(0.0))
        expected, found = old, old
        for _ in range(3):
            expected = server_step(expected, updates(), aggregate=mean, optimise=optimise)
            found = server_step(found, updates(), aggregate=rule, optimise=optimise)
        assert torch.equal(SCHEMA.flat(found.params), SCHEMA.flat(expected.params))
        assert found.memory.keys() == expected.memory.keys()
        assert all(torch.equal(found.memory[name], value) for name, value in expected.memory.items())
        assert not SCHEMA.flat(old.params).any()


def test_a_mask_rule_may_change_the_mask_that_it_gets_and_not_the_parameters() -> None:
    def shrinks(number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
        if mask is None:
            return {"w": torch.tensor([[True, True], [True, False]])}
        mask["w"][0, number % 2] = False
        return mask

    def meddles(number: int, mask: Mask | None, params: Params, grads: Grads | None) -> Mask | None:
        params["w"].zero_()
        return mask

    one = server_step(state(), updates(), aggregate=coverage_mean, adjust_mask=shrinks)
    assert one.mask is not None
    held = {name: part.clone() for name, part in one.mask.items()}
    two = server_step(one, updates(), aggregate=coverage_mean, adjust_mask=shrinks)
    assert torch.equal(one.mask["w"], held["w"]), "clients hold this mask"
    assert two.mask is not None
    assert two.mask["w"].tolist() == [[False, True], [True, False]]
    with pytest.raises(UserError, match="the mask rule changed the parameters in place"):
        server_step(state(), updates(), aggregate=coverage_mean, adjust_mask=meddles)


def test_a_mask_that_stays_is_the_same_object() -> None:
    mask = {"w": torch.tensor([[True, True], [True, False]])}
    old = replace(state(), mask=mask)
    new = server_step(old, updates(), aggregate=coverage_mean, adjust_mask=lambda number, mask, params, grads: mask)
    assert new.mask is mask


def test_a_metric_is_averaged_over_those_that_report_it_with_their_weights() -> None:
    log = RoundLog()
    log.add(10, {"loss": 1.0, "val_auc": 0.9})
    log.add(30, {"loss": 2.0})
    log.add(20, {"loss": 3.0, "val_auc": 0.6, "odd": -1.0})
    assert log.metrics == {
        "loss": pytest.approx((10 + 60 + 60) / 60),
        "val_auc": pytest.approx((10 * 0.9 + 20 * 0.6) / 30),
        "odd": -1.0,
    }
    assert RoundLog().metrics == {}


CLIENT = """
from fl_sim import Update, load, snapshot
from fl_sim.training import local_sgd

def partial(task, ctx):
    load(ctx.model, task.params)
    metrics = local_sgd(ctx.model, ctx.data, lr=0.1, steps=1, rng=ctx.rng)
    told = {"val_auc": 0.9} if ctx.num_examples % 2 else {}
    return Update(snapshot(ctx.model), ctx.num_examples, None, {**metrics, **told, "undefined": float("nan"), "far": 1e999})
"""


def strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_rounds_stay_json_where_a_metric_is_not_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_ones_own.py").write_text(CLIENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = run(tiny(tmp_path, "client=of_ones_own:partial", "rounds=4"))
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    rows = [strict(line) for line in (report.folder / "rounds.jsonl").read_text().splitlines()]
    strict((report.folder / "summary.json").read_text())
    for row in rows:
        assert isinstance(row, dict)
        assert row.get("train_val_auc", 0.9) == pytest.approx(0.9)
        assert row["train_undefined"] is None
        assert row["train_far"] is None
    assert any("train_val_auc" in row for row in report.rounds)
    again = Report.load(report.folder)
    assert math.isnan(again.rounds[0]["train_undefined"])
    assert again.rounds[0].keys() == report.rounds[0].keys()


def test_json_says_null_for_what_it_has_no_word_for() -> None:
    tree = {"a": [1.0, math.nan, (math.inf, -math.inf)], "b": {"c": "NaN", "d": True, "e": 2**70}, "f": None}
    assert strict(as_json(tree)) == {
        "a": [1.0, None, [None, None]],
        "b": {"c": "NaN", "d": True, "e": 2**70},
        "f": None,
    }


def test_the_log_warns_once_a_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def first(state, updates):\n    return next(iter(updates)).params\n"
    (tmp_path / "lazy_rule.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = run(tiny(tmp_path, *FOUR, "strategy.aggregate=lazy_rule:first"))
    assert report.ledger.messages(phase="train") == {"down": 8, "up": 8}, "what was not read is booked"
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 2
    assert all("did not read 3 of" in r.getMessage() for r in said)
