"""Keys that change nothing are said, each in one line, and those that do are not."""

from __future__ import annotations

import logging
from pathlib import Path

import computed_weights
import pytest
from federation import run_tiny, tiny
from torch import nn

from fl_sim import ClientContext, Experiment, Task, Update, load, local_sgd, snapshot
from fl_sim.communication.ledger import Ledger
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.idle_keys import _of_initialisation, tell_idle_keys
from fl_sim.simulation.server import build_server

LINKS = ("network.links={4G=1}", "schedule.kind=fedbuff", "schedule.buffer=3")
IDLE = {
    "data.alpha": (("data.partition=iid",), "0.1"),
    "data.shards": ((), "3"),
    "data.noise": ((), "8"),
    "training.momentum": (("training.optimizer=adamw",), "0.9"),
    "training.decay_to": ((), "0.5"),
    "training.decay_end": ((), "5"),
    "training.clip": ((), "model"),
    "strategy.trim": ((), "0.3"),
    "strategy.byzantine": (("strategy.aggregate=median",), "0.3"),
    "schedule.mixing": (LINKS, "0.3"),
    "schedule.exponent": ((*LINKS, "schedule.staleness=constant"), "2.0"),
    "attack.scale": (("attack.kind=label_flip",), "3.0"),
    "wire.record_megabytes": ((), "5.0"),
    "wire.uplink.masks": ((), "smallest"),
    "wire.error_feedback": ((), "true"),
}
READ = (
    ("data.alpha=0.1",),
    ("data.partition=quantity", "data.alpha=0.1"),
    ("data.partition=shards", "data.shards=3"),
    ("training.momentum=0.9", "training.decay=linear", "training.decay_to=0.5", "training.decay_end=5"),
    ("training.clip_norm=1.0", "training.clip=model"),
    ("strategy.aggregate=trimmed", "strategy.trim=0.3"),
    ("cohort.size=6", "strategy.aggregate=multi_krum", "strategy.byzantine=0.1"),
    ("model.statistics=recalibrate", "data.noise=64"),
    ("strategy=strategies.presets:layer_adaptive", "strategy.kilobytes=90", "data.noise=32"),
    (*LINKS, "schedule.staleness=hinge", "schedule.exponent=2.0"),
    ("wire.record_payloads=1", "wire.record_megabytes=5.0"),
    ("client=clients.presets:topk", "wire.error_feedback=true", "wire.uplink.masks=smallest"),
    ("wire.uplink.values=int8", "wire.uplink.content=difference", "wire.error_feedback=true"),
    ("model.batchnorm_init=one_one", "strategy=strategies.presets:global_magnitude", "wire.uplink.masks=smallest"),
)
NORMS = ("model.trainable=batchnorm",)
OF_WEIGHTS = {
    "client": ("client=clients.presets:topk",),
    "strategy": ("strategy=strategies.presets:global_magnitude",),
    "strategy = 'strategies.presets:layer_adaptive'": (
        "strategy=strategies.presets:layer_adaptive",
        "strategy.kilobytes=20",
        "data.noise=16",
    ),
    "wire.budget": ("wire.budget.megabytes=0.2", "wire.uplink.content=difference"),
    "wire.uplink.values": ("wire.uplink.values=int8", "wire.uplink.content=difference"),
    "wire.broadcast.density": ("wire.broadcast.density=0.1",),
}


def told(caplog: pytest.LogCaptureFixture, experiment: Experiment) -> list[str]:
    """What is said of keys without effect, before round 1."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fl_sim"):
        tell_idle_keys(experiment)
        federation = Federation.build(experiment)
        build_server(federation, Ledger())
    said = ("no effect here", "rounds nothing here", "weights take no part")
    return [line for line in caplog.messages if any(words in line for words in said)]


@pytest.mark.parametrize("key", IDLE)
def test_a_key_without_effect_is_said_and_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str) -> None:
    beside, value = IDLE[key]
    experiment = tiny(tmp_path / "with", *beside, f"{key}={value}")
    with caplog.at_level(logging.WARNING, "fl_sim"):
        given = run_tiny(tmp_path / "with", *beside, f"{key}={value}")
    (line,) = [line for line in caplog.messages if "no effect here" in line]
    assert line.startswith(f"{key} = ")
    assert experiment.rounds == 2
    without = run_tiny(tmp_path / "without", *beside)
    assert given.summary["params_sha256"] == without.summary["params_sha256"]
    assert given.ledger.to_table().equals(without.ledger.to_table())


@pytest.mark.parametrize("overrides", READ, ids=[overrides[-1] for overrides in READ])
def test_nothing_is_said_of_keys_that_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...]
) -> None:
    assert told(caplog, tiny(tmp_path, *overrides)) == []


@pytest.mark.parametrize("what", OF_WEIGHTS)
def test_what_is_about_weights_is_said_where_none_travel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    (line,) = told(caplog, tiny(tmp_path, *NORMS, *OF_WEIGHTS[what]))
    assert line.startswith(what)
    assert "none travels (model.trainable = 'batchnorm')" in line
    assert told(caplog, tiny(tmp_path, *OF_WEIGHTS[what])) == []


def test_initial_batchnorm_is_said_of_a_model_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        build_server(Federation.build(tiny(tmp_path, "model.name=mlp", "model.batchnorm_init=one_one")), Ledger())
    assert "model.batchnorm_init = 'one_one': has little effect here" in caplog.text
    assert "stay as the model was built" not in caplog.text


def test_weights_that_an_initialisation_leaves_alone_are_named(caplog: pytest.LogCaptureFixture) -> None:
    found = list(_of_initialisation("model.batchnorm_init = 'fixed'", computed_weights.chain("weight_norm", (1, 2))))
    assert [line.partition("; ")[2] for line in found] == [
        "3.weight and 1 more stay as the model was built (2 computed from other tensors)"
    ]
    recurrent = nn.Sequential(nn.BatchNorm1d(8), nn.LSTM(8, 8))
    (line,) = _of_initialisation("model.batchnorm_init = 'fixed'", recurrent)
    assert "1.weight_ih_l0 and 1 more stay as the model was built (0 computed" in line
    assert not list(_of_initialisation("", computed_weights.chain()))


def test_a_share_that_nobody_trains_on_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        tell_idle_keys(tiny(tmp_path, "data.proxy=0.2"))
        tell_idle_keys(tiny(tmp_path, "data.proxy=0.2", "model.statistics=recalibrate"))
    (line,) = caplog.messages
    assert line.startswith("data.proxy = 0.2: no client trains on this share, and nothing else here does")


def own(task: Task, ctx: ClientContext) -> Update:
    """A client with a learning rate of its own."""
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=0.05, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples)


def test_a_client_that_asks_for_no_training_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = tiny(tmp_path, f"client={__name__}:own", "training.momentum=0.9", "training.lr=0.3")
    (line,) = told(caplog, experiment)
    assert line.startswith("[training]: lr, steps, batch_size, momentum: no effect here")
    assert told(caplog, tiny(tmp_path, "training.momentum=0.9")) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), None),
        (("network.links.4G=1", "network.dropout=0.1"), "network.dropout"),
        (("network.links.4G=1", "network.deadline_s=100"), "network.deadline_s"),
        (("wire.uplink.values=int8", "wire.uplink.content=difference"), "wire.uplink.values = 'int8', which rounds"),
    ],
)
@pytest.mark.parametrize("method", ["scaffold", "feddyn", "fednova"])
def test_where_clients_and_server_get_out_of_step_is_said(
    method: str, options: tuple[str, ...], told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = (f"client.target=clients.presets:{method}", f"strategy.target=strategies.presets:{method}")
    if method == "fednova":
        named, told = (f"client.target=clients.presets:{method}", named[1]), None  # its clients keep nothing
    run_tiny(tmp_path, *named, *options, "rounds=1", "training.steps=1")
    lines = [each.getMessage() for each in caplog.records if "both drift apart" in each.getMessage()]
    assert [line.startswith(told or "") for line in lines] == ([] if told is None else [True])
