"""Clients with gates: what is retained, what travels, controls at equal density, keep ratios by plan, device and gap."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from federation import WHOLE, run_tiny, tiny

from clients import presets
from clients.local import _restore, _within
from clients.retention import (
    KEEP,
    Profile,
    RetainChannels,
    at_random,
    change_magnitude,
    frequency,
    rows,
    rows_and_columns,
    salience,
)
from fl_sim import Experiment, Report, count_macs
from fl_sim.communication.exchange import Coding
from fl_sim.core.seeding import Purpose, generator, numpy_generator
from fl_sim.core.types import Task, Update, UserError
from fl_sim.gating import Gated, Gating, keeping
from fl_sim.models import build, prunable_names
from fl_sim.simulation.client_side import client_of, host_of
from fl_sim.simulation.federation import Federation
from fl_sim.training import Training, evaluate, load, snapshot
from fl_sim.training.client import ClientContext
from fl_sim.training.model_file import read_model

GATED = ("client.target=clients.presets:adaptive_pruning", "gating.salience=gate")


def context(federation: Federation, *, number: int = 1) -> ClientContext:
    data = federation.data.train.subset(federation.partitions[0])
    return ClientContext(federation.first.model, data, generator(0, number, 0, Purpose.CLIENT))


def upload(out: Path, *overrides: str) -> tuple[Federation, Task, Update, ClientContext]:
    federation = Federation.build(tiny(out, *GATED, *overrides))
    task, ctx = Task(1, federation.first.initial), context(federation)
    return federation, task, client_of(federation.first)(task, ctx), ctx


@pytest.mark.parametrize("salience", ["gate", "activation", "taylor", "weight"])
def test_upload_is_the_local_model_on_retained_coordinates_and_the_received_one_elsewhere(
    tmp_path: Path, salience: str
) -> None:
    federation, task, update, ctx = upload(tmp_path, f"gating.salience={salience}", "client.keep_up=0.3")
    trained = snapshot(ctx.model)
    schema = federation.first.exchange.schema
    coding, ends = Coding(), {"schema": schema, "held_mask": None}
    sent = coding.encode(update.params, update.mask, task.params, seed=0, **ends)
    arrived = federation.first.exchange.reconstructed(*coding.decode(sent, task.params, **ends), task.params)
    for name, value in arrived.items():
        alive = update.mask.get(name)
        if alive is not None:
            assert torch.equal(value[alive], trained[name][alive])
            assert torch.equal(value[~alive], task.params[name][~alive])
        assert torch.equal(value, update.params[name]), name


def test_rows_of_a_channel_go_together_and_statistics_travel(tmp_path: Path) -> None:
    _, task, update, ctx = upload(tmp_path, "client.keep_up=0.3", "training.weight_decay=0.01")
    assert isinstance(ctx.model, Gated)
    kept = RetainChannels(0.3)(task, ctx)
    for conv, group in ctx.model.groups.items():
        channels = ctx.model.gates[conv].channels
        scores = ctx.model.use()[conv].salience.tolist()
        best = sorted(range(channels), key=lambda c: (-scores[c], c))[: max(1, round(0.3 * channels))]
        for name in group:
            rows = (update.params[name] != task.params[name]).reshape(channels, -1).any(dim=1)
            assert set(rows.nonzero()[:, 0].tolist()) <= set(best), name
            assert set(kept[name].reshape(channels, -1).all(dim=1).nonzero()[:, 0].tolist()) == set(best)
        assert any(name.endswith("bn1.weight") or ".4." in name or ".7." in name for name in group)
    assert all(
        not torch.equal(update.params[name], task.params[name])
        for name in update.params
        if name.endswith(("running_mean", "running_var"))
    )
    first, last = "net.0.weight", "net.11.weight"
    assert update.mask[first].all()
    assert update.mask[last].all()


def plain_names(report: Report) -> dict[str, torch.Tensor]:
    return {name.removeprefix("net."): value for name, value in report.params.items()}


def test_everything_kept_and_retained_is_fedavg(tmp_path: Path, finished: Callable[..., Report]) -> None:
    dense = finished()
    full = run_tiny(tmp_path / "full", *GATED, "gating.salience=activation", "gating.keep=1.0", "client.keep_up=1.0")
    assert all(torch.equal(value, dense.params[name]) for name, value in plain_names(full).items())
    assert full.summary["macs"] == dense.summary["macs"]
    assert full.summary["dense_total_bytes"] == dense.summary["dense_total_bytes"]


def test_controls_send_exactly_as_much(tmp_path: Path) -> None:
    sent = {}
    for target in ("adaptive_pruning", "random_channels", "magnitude_channels"):
        report = run_tiny(tmp_path / target, *GATED, f"client.target=clients.presets:{target}", "client.keep_up=0.25")
        sent[target] = report.ledger.total(by=("direction", "section"), column="nnz")["up", "values"]
        assert 0.2 < report.summary["density"]["uplink_mean"] < 0.35
    assert len(set(sent.values())) == 1


def test_the_union_of_the_masks_retains_more_than_a_ranking(tmp_path: Path) -> None:
    asked = ("client.target=clients.presets:active_channels", "gating.keep=0.25")
    federation = Federation.build(tiny(tmp_path, *GATED, *asked))
    task, ctx = Task(1, federation.first.initial), context(federation)
    update = client_of(federation.first)(task, ctx)
    assert isinstance(ctx.model, Gated)
    for conv, use in ctx.model.use().items():
        on = update.mask[f"net.{conv}.weight"].flatten(1).any(dim=1)
        assert torch.equal(on, use.active > 0)
        assert on.float().mean() > 0.25


def test_scores_differ_as_their_names_say(tmp_path: Path) -> None:
    _, task, _, ctx = upload(tmp_path)
    assert isinstance(ctx.model, Gated)
    scores = {score.__name__: score(task, ctx) for score in (salience, frequency, at_random, change_magnitude)}
    for conv, g in ctx.model.gates.items():
        assert all(s[conv].shape == (g.channels,) for s in scores.values())
        assert torch.allclose(scores["frequency"][conv].sum(), torch.tensor(float(g.kept)), rtol=1e-5)
        weight = task.params[f"net.{conv}.weight"]
        assert torch.allclose(scores["change_magnitude"][conv], torch.stack([f.abs().sum() for f in weight]), rtol=1e-4)
    again = at_random(task, context(Federation.build(tiny(tmp_path, *GATED))))
    assert any(not torch.equal(again[conv], scores["at_random"][conv]) for conv in again)


def test_topk_within_retained_channels(tmp_path: Path) -> None:
    federation, task, update, ctx = upload(tmp_path, "client.keep_up=0.5", "client.density=0.1")
    retained = RetainChannels(0.5)(task, ctx)
    names = prunable_names(ctx.model)
    alive = sum(int(m.sum()) for m in update.mask.values())
    assert alive == pytest.approx(0.1 * federation.first.exchange.schema.prunable_size, abs=1)
    assert all(not (update.mask[n] & ~retained[n]).any() for n in names if n in retained)
    # They are the largest changes among what may travel.
    change = {n: (update.params[n] - task.params[n]).abs() for n in names}
    least = min(float(change[n][update.mask[n]].min()) for n in names if update.mask[n].any())
    assert all(float(change[n][~update.mask[n]].max()) <= least for n in names if not update.mask[n].all())


def test_columns_of_channels_that_are_not_retained_stay_too(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, *WHOLE, *GATED))
    model = federation.first.model
    assert isinstance(model, Gated)
    assert model.readers == {"3": ("net.6.weight",), "6": ()}
    kept = {conv: torch.arange(g.channels) % 3 == 0 for conv, g in model.gates.items()}
    mask = rows_and_columns(model, federation.first.initial, kept)
    expected = kept["6"][:, None] & kept["3"][None, :]
    assert torch.equal(mask["net.6.weight"], expected[:, :, None, None].expand(64, 32, 3, 3))
    assert torch.equal(mask["net.3.weight"], rows(model, federation.first.initial, kept)["net.3.weight"])
    sent = {}
    for extent in ("rows", "rows_and_columns"):
        report = run_tiny(tmp_path / extent, *GATED, f"client.extent={extent}")
        sent[extent] = report.summary["density"]["uplink_mean"]
    assert sent["rows_and_columns"] < 0.7 * sent["rows"]


def test_restoring_and_intersecting() -> None:
    params, received = {"w": torch.ones(2, 2), "b": torch.ones(2)}, {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    kept = {"w": torch.tensor([[True], [False]]).expand(2, 2)}
    _restore(params, received, kept)
    assert params["w"].tolist() == [[1, 1], [0, 0]]
    assert params["b"].tolist() == [1, 1]
    mask = _within({"w": torch.tensor([[True, False], [True, False]])}, kept, {"w": params["w"]})
    assert mask["w"].tolist() == [[True, False], [False, False]]
    assert _within(None, kept, params)["b"].all()


def test_a_profile_gives_each_client_one_ratio_for_good(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, *GATED))
    profile, task = Profile((0.25, 0.5, 1.0)), Task(1, federation.first.initial)
    drawn = set()
    for number in range(20):
        ctx = context(federation, number=number)
        first = profile(task, ctx)
        assert all(profile(task, ctx) == first for _ in range(3))
        drawn.add(first)
    assert drawn == {0.25, 0.5, 1.0}
    report = run_tiny(tmp_path, *GATED, "client.profile=[0.25, 1.0]", "rounds=3")
    assert report.summary["failures"]["raised"] == 0


def test_the_ratio_falls_on_its_schedule_on_both_sides(tmp_path: Path) -> None:
    plan = Gating(keep=0.25, start=1, end=3)
    assert [round(plan.at(n), 3) for n in (1, 2, 3, 4)] == [1.0, 0.344, 0.25, 0.25]
    assert Gating(keep={"3": 0.5}).at(1) == {"3": 0.5}
    federation = Federation.build(tiny(tmp_path, *WHOLE, *GATED, "gating.keep=0.25", "gating.start=1", "gating.end=3"))
    assert isinstance(federation.first.model, Gated)
    seen = []
    for g in federation.first.model.gates.values():
        g.register_forward_hook(lambda m, i, o: seen.append(m.kept / m.channels))
    client_of(federation.first)(Task(1, federation.first.initial), context(federation))
    assert set(seen) == {1.0}
    with federation.first.as_in(2):
        assert set(federation.first.model.keep.values()) == {11 / 32}
    assert set(federation.first.model.keep.values()) == {0.25}


@pytest.mark.parametrize(("name", "budget"), [("cnn_bn", 0.5), ("resnet8", 0.5), ("resnet8", 0.9)])
def test_a_budget_is_kept_and_used_up(name: str, budget: float) -> None:
    model = build(name)
    gated = Gating(macs_budget=budget).wrap(model, seed=0)
    plan = Gating(macs_budget=budget).settled(gated, (3, 32, 32))
    gated.set_keep(plan.keep)
    share = (gated.count_macs(torch.zeros(1, 3, 32, 32)).item() + gated.gate_macs) / count_macs(model, (3, 32, 32))
    assert budget - 0.05 < share <= budget
    with pytest.raises(UserError, match="least this model takes"):
        Gating(macs_budget=0.001).settled(gated, (3, 32, 32))


def test_the_budget_shows_in_the_summary(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *WHOLE, *GATED, "gating.macs_budget=0.5")
    macs = report.summary["macs"]
    assert macs["dense"] == count_macs(build("cnn_bn", in_channels=1, image_size=8), (1, 8, 8))
    assert 0.45 < macs["mean"] / macs["dense"] <= 0.5


def test_a_client_prunes_as_it_overfits(tmp_path: Path) -> None:
    options = {"training": Training(lr=0.1, epochs=1), "gating": Gating(keep=0.5), "step": 0.2, "least": 0.5}
    federation = Federation.build(tiny(tmp_path, *GATED))
    for limit, expected in ((-100.0, [0.8, 0.6, 0.5, 0.5]), (100.0, [1.0, 1.0])):
        client, ctx = presets.gap_pruning(**options, limit=limit), context(federation)
        for ratio in expected:
            update = client(Task(1, federation.first.initial), ctx)
            assert float(ctx.state[KEEP]) == pytest.approx(ratio)
            assert math.isfinite(update.metrics["gap"])
        assert update.num_examples == len(ctx.data)


def test_threshold_zeroes_small_weights_and_sends_the_rest(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path))
    client = presets.weight_threshold(training=Training(lr=0.1, epochs=2), threshold=0.02)
    update = client(Task(1, federation.first.initial), context(federation))
    for name, mask in update.mask.items():
        assert torch.equal(mask, update.params[name] != 0)
        if update.params[name].dim() == 4:
            assert 0 < mask.float().mean() < 1
            assert update.params[name][mask].abs().min() > 0.02
    report = run_tiny(tmp_path, "client.target=clients.presets:weight_threshold", "client.threshold=0.02")
    assert report.summary["density"]["uplink_mean"] < 1.0


def test_threshold_leaves_frozen_weights_and_refuses_a_model_without_any_to_zero(tmp_path: Path) -> None:
    threshold = ("client.target=clients.presets:weight_threshold", "client.threshold=0.02")
    last = run_tiny(tmp_path / "last", *threshold, "model.name=cnn_bn", "model.trainable=head+3.weight")
    assert last.summary["density"]["uplink_mean"] < 1.0
    for none in (("model.name=mlp",), ("model.trainable=head",), ("model.adapter={rank=2}",)):
        with pytest.raises(UserError, match=r"weight_threshold.*no convolution weight is trained"):
            run_tiny(tmp_path / "none", *threshold, *none)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gating.kep=0.5", ["'gating.kep'", "'keep'"]),
        ("gating.keep=2.0", ["gating.keep = 2.0", "at most 1"]),
        ("gating.salience=gates", ["'gates'", "'gate'"]),
        ("gating.start=3", ["start = 3", "end = 0"]),
        ("gating.macs_budget=0.0", ["macs_budget = 0.0"]),
        ("gating.keep={'9' = 0.5}", ["gating.keep['9']", "allowed: 3, 6"]),
        ("model.name=mlp", ["no inner convolution"]),
        ("client.keep_up=0", ["keep_up = 0"]),
        ("client.extent=row", ["client.extent", "'rows'"]),
        ("client.profile=[2.0]", ["profile: 2.0"]),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        client_of(Federation.build(tiny(tmp_path, *GATED, override)).first)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_gated_client_without_gates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"add a \[gating\] table"):
        client_of(Federation.build(tiny(tmp_path, GATED[0])).first)


def test_ratios_by_layer_survive_the_config_file(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, *GATED, "gating.keep={'layer1.0' = 0.5, layer3 = 0.25}")
    path = tmp_path / "x.toml"
    path.write_text(experiment.to_toml())
    assert Experiment.load(path).gating == experiment.gating


def test_the_model_file_of_a_gated_run_describes_its_gates(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *GATED, "gating.macs_budget=0.5")
    model = read_model(report.folder / "model.safetensors")
    federation = Federation.build(tiny(tmp_path, *GATED, "gating.macs_budget=0.5"))
    assert isinstance(model, Gated)
    assert model.keep == federation.first.model.keep
    images, _ = next(federation.data.test.batches(8))
    with torch.no_grad():
        assert torch.equal(model(images), load(federation.first.model, report.params).eval()(images))


def test_over_fitting_is_measured_on_each_client(tmp_path: Path) -> None:
    overrides = [
        "model.name=mlp",
        "rounds=3",
        "data.clients=3",
        "cohort.size=3",
        "training.steps=300",
        "evaluate.every=2",
    ]
    report = run_tiny(tmp_path / "measured", *overrides, "evaluate.fit=40")
    plain = run_tiny(tmp_path / "plain", *overrides)
    assert all(torch.equal(value, plain.params[name]) for name, value in report.params.items())
    assert report.ledger.total() == plain.ledger.total()
    first, second, last = report.rounds
    assert not any(key.startswith(("train_seen", "train_unseen")) for key in first)
    for row in (second, last):
        # Trained long on few samples: it knows them better than what it has not seen.
        assert row["train_seen_accuracy"] > 0.99
        assert row["train_seen_loss"] < row["train_unseen_loss"]


def test_over_fitting_is_measured_at_the_rounds_ratio(tmp_path: Path) -> None:
    asked = ("evaluate.fit=30", "gating.keep=0.25", "gating.start=1", "gating.end=3", "rounds=1")
    federation = Federation.build(tiny(tmp_path, *GATED, *asked))
    ctx, measure = context(federation), host_of(federation, federation.first).measure
    seen = ctx.data.subset(numpy_generator(0, 0, 0, Purpose.EVALUATION).permutation(len(ctx.data))[:30])
    found = measure(1, 0, federation.first.model)
    assert found["seen_loss"] != evaluate(federation.first.model, seen)["loss"]
    with keeping(federation.first.model, 1.0) as model:
        assert found["seen_loss"] == evaluate(model, seen)["loss"]


def test_statistics_are_measured_at_the_rounds_ratio(tmp_path: Path) -> None:
    asked = ("gating.keep=0.25", "gating.start=1", "gating.end=3", "rounds=1", "model.statistics=recalibrate")
    report = run_tiny(tmp_path, *GATED, *asked)
    federation = Federation.build(tiny(tmp_path, *GATED, *asked))
    assert isinstance(federation.first.model, Gated)
    with keeping(federation.first.model, 1.0):
        found = evaluate(federation.first.complete(report.params), federation.data.test)
    assert report.rounds[0]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    elsewhere = federation.first.complete(report.params)
    with keeping(federation.first.model, 1.0):
        assert report.rounds[0]["loss"] != pytest.approx(evaluate(elsewhere, federation.data.test)["loss"], rel=1e-3)
