"""Personal parts: trained by each client, kept in its state, never sent; measured on the clients that have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import WHOLE, run_tiny, same, tiny
from interruption import KillAfter, Killed

from fl_sim import UserError, run
from fl_sim.models import build, freeze, personal_names
from fl_sim.models.parameters import snapshot
from fl_sim.simulation.client_side import host_of
from fl_sim.simulation.federation import Federation

FEDPER = ("model.personal=head", "evaluate.clients=4")


def test_what_is_personal_travels_neither_way(tmp_path: Path) -> None:
    whole, split = run_tiny(tmp_path / "whole", *WHOLE, "evaluate.clients=4"), run_tiny(tmp_path / "split", *FEDPER)
    head = [name for name in snapshot(build("cnn_bn", in_channels=1, image_size=8)) if name.startswith("11.")]
    assert set(whole.params) - set(split.params) == set(head)
    held = sum(whole.params[name].numel() for name in head)
    assert whole.results.trainable_params - split.results.trainable_params == held
    messages = whole.ledger.messages(phase="train")
    sections = [
        sum(report.ledger.total(where={"section": each})[()] for each in ("values", "dense"))
        for report in (whole, split)
    ]
    evaluations = 4 * 2
    assert sections[0] - sections[1] == 4 * held * (sum(messages.values()) + evaluations)


def test_parts_of_half_precision_are_kept_bit_for_bit(tmp_path: Path) -> None:
    """The head travels neither way, so that what a client evaluates is what it kept: in bfloat16, what it trained."""
    overrides = ("model.name=special:build_half", *FEDPER, "cohort.size=6", "evaluate.clients=6", "training.steps=2")
    whole = run_tiny(tmp_path / "whole", *overrides, "rounds=3")
    experiment = tiny(tmp_path / "parts", *overrides, "rounds=3")
    with pytest.raises(Killed):
        run(experiment, KillAfter(2))
    same(whole, run(experiment, resume=True))
    still = run_tiny(tmp_path / "still", *overrides, "rounds=3", "training.lr=1e-30")
    assert {row["clients_loss"] for row in still.rounds} == {still.rounds[0]["clients_loss"]}
    assert whole.rounds[-1]["clients_loss"] < still.rounds[-1]["clients_loss"]


@pytest.mark.parametrize("engine", ["workers", "cohort"])
def test_every_engine_keeps_them_alike(engine: str, tmp_path: Path) -> None:
    overrides = (*FEDPER, "training.steps=2", "rounds=3")
    one = run_tiny(tmp_path / "inline", *overrides)
    other = run_tiny(tmp_path / engine, *overrides, f"engine={engine}", "workers.count=2")
    if engine == "workers":
        same(one, other)
    assert one.rounds[-1]["accuracy"] == pytest.approx(other.rounds[-1]["accuracy"], abs=0.05)


def test_a_stopped_run_finds_them_again(tmp_path: Path) -> None:
    whole = run_tiny(tmp_path / "whole", *FEDPER, "rounds=3")
    experiment = tiny(tmp_path / "parts", *FEDPER, "rounds=3")
    with pytest.raises(Killed):
        run(experiment, KillAfter(2))
    same(whole, run(experiment, resume=True))


def test_a_client_measures_its_own_head(tmp_path: Path) -> None:
    """Each client has two of ten digits: heads of their own know which, one head for all does not."""
    skewed = ("data.partition=shards", "rounds=4", "data.clients=5", "cohort.size=5", "evaluate.clients=5")
    shared = run_tiny(tmp_path / "shared", *skewed)
    own = run_tiny(tmp_path / "own", *skewed, "model.personal=head")
    assert own.rounds[-1]["clients_accuracy"] > shared.rounds[-1]["clients_accuracy"] + 0.1
    assert own.rounds[-1]["accuracy"] == own.rounds[-1]["clients_accuracy"]
    assert own.rounds[-1]["clients_accuracy_p10"] <= own.rounds[-1]["clients_accuracy_p90"]
    assert own.results.score.final == own.rounds[-1]["accuracy"]


@pytest.mark.parametrize("part", ["model.trainable=batchnorm+head", "model.adapter.train=head"])
def test_heads_are_kept_beside_frozen_weights(part: str, tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *FEDPER, part, "training.steps=2")
    assert not any(report.results.failures.values())
    assert not [name for name in report.params if name.startswith("11.")]


def test_the_seed_of_the_run_makes_the_first_heads(tmp_path: Path) -> None:
    for seed in (0, 3):
        federation = Federation.build(tiny(tmp_path, *FEDPER, f"seed={seed}"), quiet=True)
        host = host_of(federation, federation.first)
        built = snapshot(build("cnn_bn", in_channels=1, image_size=8, seed=seed))
        assert torch.equal(host.rebuild(0)["11.weight"], built["11.weight"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.personal=head"], "the server holds no trained personal parts, so that clients measure"),
        (["model.personal=tail", "evaluate.clients=2"], "model.personal = 'tail': 'tail' selects no trained parameter"),
        (["model.personal=*", "evaluate.clients=2"], "selects every trained parameter, so that nothing is shared"),
        ([*FEDPER, 'capacities=[{name="mlp"}]'], "model.personal = 'head': not with capacities"),
        ([*FEDPER, "model.trainable=batchnorm"], "'head' selects no trained parameter"),
    ],
)
def test_what_cannot_be_personal_is_one_line(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tiny(tmp_path, *overrides))
    assert words in str(caught.value)


def test_what_is_allowed_instead_selects_something_of_this_model() -> None:
    plain, normed = (build(name, in_channels=1, image_size=8) for name in ("mlp", "cnn_bn"))
    with pytest.raises(
        UserError, match=r"'batchnorm' selects no trained parameter of this model; allowed: head, a glob"
    ):
        personal_names(plain, "batchnorm")
    with pytest.raises(UserError, match=r"'norm' selects no parameter of this model; allowed: all, head, a glob"):
        freeze(plain, "norm")
    with pytest.raises(
        UserError, match=r"'tail' selects no parameter .* allowed: all, batchnorm, norm, head, random, a glob"
    ):
        freeze(normed, "tail")
    assert all(parameter.requires_grad for parameter in normed.parameters())


def test_batchnorm_is_personal_by_its_role() -> None:
    model = build("cnn_bn", in_channels=1, image_size=8)
    assert all(name.split(".")[0] in {"1", "4", "7"} for name in personal_names(model, "batchnorm"))
    assert len(personal_names(model, "batchnorm+head")) == len(personal_names(model, "batchnorm")) + 2
