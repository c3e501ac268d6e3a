"""The doctor finds what is wrong with deliberately broken clients, and nothing wrong with good ones."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.presets import fedavg, fedprox, topk
from fl_sim import ClientContext, Task, Update, load, local_sgd, snapshot
from fl_sim.cli import main
from fl_sim.runtime.client import doctor
from fl_sim.runtime.client.doctor_behaviour_checks import fast
from fl_sim.training import Training


def good(task: Task, ctx: ClientContext) -> Update:
    model = load(ctx.model, task.params)
    metrics = local_sgd(model, ctx.data, lr=0.1, mask=task.mask, rng=ctx.rng)
    return Update(params=snapshot(model), mask=task.mask, num_examples=ctx.num_examples, metrics=metrics)


def raises(task: Task, ctx: ClientContext) -> Update:
    raise KeyError("by design")


def no_update(task: Task, ctx: ClientContext) -> Update:
    return snapshot(ctx.model)  # type: ignore[return-value]


def missing(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    return dataclasses.replace(update, params=dict(list(update.params.items())[:-1]))


def reshaped(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    return dataclasses.replace(update, params={n: p.reshape(-1) for n, p in update.params.items()})


def whole_state(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    return dataclasses.replace(update, params={n: p.detach().clone() for n, p in ctx.model.state_dict().items()})


def halves(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    return dataclasses.replace(update, params={n: p.half() for n, p in update.params.items()})


def diverges(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    return dataclasses.replace(update, params={n: p * torch.inf for n, p in update.params.items()})


def lazy(task: Task, ctx: ClientContext) -> Update:
    return Update(params=dict(task.params), mask=task.mask, num_examples=ctx.num_examples, metrics={})


def evaluating(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    frozen = {n: task.params[n] if "running" in n else p for n, p in update.params.items()}
    return dataclasses.replace(update, params=frozen)


def miscounts(task: Task, ctx: ClientContext) -> Update:
    return dataclasses.replace(good(task, ctx), num_examples=1)


def in_place(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    next(iter(task.params.values())).add_(1.0)
    return update


def borrowed(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    own = ctx.model.state_dict()
    return dataclasses.replace(update, params={n: own[n] for n in update.params})


def dice(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    return dataclasses.replace(update, params={n: p + 1e-3 * torch.rand_like(p) for n, p in update.params.items()})


def leftover(task: Task, ctx: ClientContext) -> Update:
    metrics = local_sgd(ctx.model, ctx.data, lr=0.1, mask=task.mask, rng=ctx.rng)
    return Update(params=snapshot(ctx.model), mask=task.mask, num_examples=ctx.num_examples, metrics=metrics)


def unmasked(task: Task, ctx: ClientContext) -> Update:
    update = good(dataclasses.replace(task, mask=None), ctx)
    return dataclasses.replace(update, mask=None)


def dense_upload(task: Task, ctx: ClientContext) -> Update:
    return dataclasses.replace(good(task, ctx), mask=None)


def masks_biases(task: Task, ctx: ClientContext) -> Update:
    return dataclasses.replace(good(task, ctx), mask={"1.weight": torch.ones(8, dtype=torch.bool)})


def slow(task: Task, ctx: ClientContext) -> Update:
    time.sleep(0.25)
    return good(task, ctx)


def as_arrays(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    mask = None if update.mask is None else {name: part.numpy() for name, part in update.mask.items()}
    return Update({name: value.double().numpy() for name, value in update.params.items()}, np.int64(96), mask, None)  # type: ignore[arg-type]


def as_module(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    mask = None if update.mask is None else {name: part.float() for name, part in update.mask.items()}
    return Update(ctx.model, ctx.num_examples, mask)  # type: ignore[arg-type]


def as_live_parameters(task: Task, ctx: ClientContext) -> Update:
    update = good(task, ctx)
    return dataclasses.replace(update, params={n: p.clone().requires_grad_() for n, p in update.params.items()})


BROKEN = {
    raises: "it raised KeyError: 'by design' (test_doctor.py",
    no_update: "returned FlatParams",
    missing: "parameters missing",
    reshaped: "other shapes",
    whole_state: "buffers averaged",
    halves: "dtype changed",
    diverges: "NaN or infinite",
    lazy: "nothing changed",
    evaluating: "BatchNorm statistics did not change",
    miscounts: "num_examples = 1, but it has 96",
    in_place: "changed task.params",
    borrowed: "the model's own tensors",
    dice: "non-deterministic",
    leftover: "another client left",
    unmasked: "pruned weights came back non-zero",
    dense_upload: "pruned weights as zeros",
    masks_biases: "not prunable",
    slow: "slow: ",
}


@pytest.fixture
def _untimed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of speed, but for the slow client: its answer depends on what else the machine does."""
    if request.getfixturevalue("client") is not slow:
        monkeypatch.setattr(doctor, "CHECKS", tuple(check for check in doctor.CHECKS if check is not fast))


@pytest.mark.usefixtures("_untimed")
@pytest.mark.parametrize(("client", "words"), BROKEN.items(), ids=[client.__name__ for client in BROKEN])
def test_broken_clients_are_told_why(client: object, words: str) -> None:
    problems = [finding.problem for finding in doctor.examine(client) if finding.problem]
    assert any(words in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)
    assert len(problems) == 1, "one fault is one finding"


@pytest.mark.usefixtures("_untimed")
@pytest.mark.parametrize(
    "client",
    [
        good,
        as_arrays,
        as_module,
        as_live_parameters,
        fedavg(training=Training()),
        fedprox(training=Training()),
        topk(training=Training(lr=0.05)),
    ],
)
def test_good_clients_are_left_alone(client: object) -> None:
    findings = doctor.examine(client)
    assert len(findings) > 10
    assert [f.problem for f in findings if f.problem] == []


def _doctor(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["fl-sim", "doctor", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_for_doctor.py").write_text("def client(task, ctx):\n    return task.config['mu']\n")
    assert _doctor(monkeypatch, "mine_for_doctor:client", "mu=0.5") == 1
    said = capsys.readouterr().out
    assert "it returned float, not an fl_sim.Update" in said
    assert _doctor(monkeypatch, "mine_for_doctor:nobody") == 2
    assert "has no callable 'nobody'" in capsys.readouterr().err


REFUSED = {
    "strategy's option": "strategy.trimm=0.1",
    "strategy's value": "strategy={target='strategies.presets:gradual_magnitude',density=2,start=1,end=3}",
    "weights": "model.weights='nowhere.safetensors'",
}


@pytest.mark.parametrize("override", REFUSED.values(), ids=REFUSED)
def test_a_config_with_which_no_run_starts_fails_with_the_line_of_the_run(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    words = ["configs/quickstart.toml", "rounds=1", f'out="{tmp_path}"', override]
    monkeypatch.setattr("sys.argv", ["fl-sim", "run", *words])
    with pytest.raises(SystemExit):
        main()
    refused = capsys.readouterr().err.strip().removeprefix("fl-sim: ")
    assert refused
    assert _doctor(monkeypatch, *words) == 1
    assert refused in capsys.readouterr().out
