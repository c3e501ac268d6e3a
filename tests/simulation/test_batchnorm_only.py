"""Federations that train and exchange a part of the model: what travels, what stays as the seed made it, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from federation import FOUR, run_tiny, tiny
from safetensors.torch import load_file
from torch import nn

from fl_sim import Report, codecs, models
from fl_sim.communication.exchange import Exchange, Frozen
from fl_sim.core.types import Params, Task, Update, UserError
from fl_sim.data import load as load_data
from fl_sim.runtime.client.fixed_weights import Resident, WrongFrozenWeights
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.starting_model import make_model
from fl_sim.training import Training, evaluate, local_sgd, snapshot
from fl_sim.training.client import ClientContext
from fl_sim.training.recalibration import recalibrate

BN = (
    "model.name=resnet14",
    "model.trainable=batchnorm",
    "training.momentum=0.9",
    "training.weight_decay=0.01",
    "training.steps=2",
)


@pytest.mark.parametrize(("depth", "count"), [(14, 1120), (20, 1568), (32, 2464), (56, 4256), (110, 8288)])
def test_parameter_counts_of_the_paper(depth: int, count: int) -> None:
    model = models.build(f"resnet{depth}")
    names = models.freeze(model, "batchnorm")
    named = dict(model.named_parameters())
    assert sum(named[name].numel() for name in names) == count == 224 + 448 * ((depth - 2) // 6)
    assert {n for n, p in named.items() if p.requires_grad} == set(names) == set(models.batchnorm_names(model))


def test_the_random_control_trains_as_many_parameters_elsewhere() -> None:
    model = models.build("resnet20")
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    plain = model(x)
    names = models.freeze(model, "random", seed=3)
    named = dict(model.named_parameters())
    assert sum(named[n].numel() for n in names) == 1568
    assert torch.equal(model(x), plain), "choosing weights must not change the function"
    data = load_data("digits").train
    small = models.build("resnet8", in_channels=1, image_size=8)
    chosen = models.freeze(small, "random", seed=3)
    first = {n: p.clone() for n, p in snapshot(small).items()}
    local_sgd(small, data, lr=0.1, steps=3, batch_size=32, rng=torch.Generator().manual_seed(0))
    moved = {n for n, p in snapshot(small).items() if not torch.equal(p, first[n])}
    assert moved >= set(chosen)
    assert all(n in chosen or n.endswith(codecs.schema.STATISTICS) for n in moved)
    weight, start = small.conv1.weight.detach(), first["conv1.parametrizations.weight.original"]
    changed = (weight != start).flatten(1).sum(dim=1)
    assert (changed <= 2).all()
    assert changed.sum() > 0
    plain_names = snapshot(models.build("resnet8", in_channels=1, image_size=8))
    back = models.merged(snapshot(small), model=small)
    assert back.keys() == plain_names.keys()
    assert torch.equal(back["conv1.weight"], weight)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("head", {"fc.weight", "fc.bias"}),
        ("batchnorm+head", None),
        ("layer3.*.bn1.*", {"layer3.0.bn1.weight", "layer3.0.bn1.bias"}),
    ],
)
def test_what_a_name_selects(spec: str, expected: set[str] | None) -> None:
    model = models.build("resnet8")
    names = set(models.freeze(model, spec))
    assert names == (expected or {"fc.weight", "fc.bias", *models.batchnorm_names(model)})


def test_norm_selects_the_scales_and_shifts_of_every_normalisation() -> None:
    tokens = models.Interface((5,), 11, vocabulary=11, each_token=True)
    model = models.build_for("transformer", tokens)
    names = models.freeze(model, "norm")
    layers = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    assert names == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    other = nn.Sequential(
        nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(4), nn.Linear(4, 2), nn.BatchNorm1d(2)
    )
    assert models.freeze(other, "norm") == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "2.weight",
        "4.weight",
        "4.bias",
    ]
    residual = models.build("resnet8")
    assert models.freeze(residual, "norm") == models.batchnorm_names(residual)


def test_a_name_that_selects_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.trainable = 'layer9.*': .*allowed: all, batchnorm, norm, head, random"):
        Federation.build(tiny(tmp_path, "model.trainable=layer9.*"))
    with pytest.raises(UserError, match=r"model.batchnorm_init = 'zeros': allowed: fixed, uniform"):
        Federation.build(tiny(tmp_path, "model.batchnorm_init=zeros"))


@pytest.mark.parametrize(
    ("init", "low", "high", "beta"),
    [("uniform", 0, 1, 0), ("positive_negative", -1, 1, 0), ("fixed", 1, 1, 0), ("one_one", 1, 1, 1)],
)
def test_published_initialisations(init: str, low: float, high: float, beta: float) -> None:
    model = models.build("resnet20")
    models.initialise(model, init, seed=5)
    named = dict(model.named_parameters())
    gamma = torch.cat([named[n] for n in models.batchnorm_names(model) if n.endswith("weight")])
    assert low <= gamma.min()
    assert gamma.max() <= high
    assert abs(float(gamma.detach().mean()) - (low + high) / 2) < 0.08
    assert all((named[n] == beta).all() for n in models.batchnorm_names(model) if n.endswith("bias"))
    conv = named["layer3.0.conv2.weight"]
    assert float(conv.detach().std()) == pytest.approx((2 / conv[0].numel()) ** 0.5, rel=0.05)
    again = models.build("resnet20", seed=9)
    models.initialise(again, init, seed=5)
    assert all(torch.equal(p, named[n]) for n, p in again.named_parameters() if n != "fc.bias")


@pytest.mark.parametrize("statistics", ["average", "local", "recalibrate"])
def test_everything_else_is_bit_identical_to_its_initial_value(
    tmp_path: Path, finished: Callable[..., Report], statistics: str
) -> None:
    overrides = [*BN, f"model.statistics={statistics}"]
    report = finished(*overrides)
    experiment = tiny(tmp_path, *overrides)
    start = snapshot(make_model(experiment, load_data("digits"), experiment.seed)[0])
    final = load_file(report.folder / "model.safetensors")
    assert final.keys() == start.keys()
    trained = set(models.batchnorm_names(make_model(experiment, load_data("digits"), 0)[0]))
    buffers = {n for n in final if n.endswith(codecs.schema.STATISTICS)}
    assert all(torch.equal(final[n], start[n]) for n in final if n not in trained | buffers)
    assert all(not torch.equal(final[n], start[n]) for n in trained)
    travelled = trained | buffers if statistics == "average" else trained
    assert report.params.keys() == travelled
    model = models.build("resnet14", in_channels=1, image_size=8)
    model.load_state_dict(final, strict=False)
    accuracy = evaluate(model, load_data("digits").test)["accuracy"]
    assert accuracy == report.summary["accuracy"]["final"], "the saved model is the measured one"


def test_policies_train_alike_and_differ_in_bytes(finished: Callable[..., Report]) -> None:
    runs = {s: finished(*BN, f"model.statistics={s}") for s in ("average", "local", "recalibrate")}
    names = runs["local"].params.keys()
    for other in ("average", "recalibrate"):
        assert all(torch.equal(runs["local"].params[n], runs[other].params[n]) for n in names)
    sections = {s: report.ledger.total(by=("section",)) for s, report in runs.items()}
    messages = 2 * 3 * 2  # rounds, clients, directions
    assert sections["average"][("buffers",)] == messages * 4 * 1120
    assert ("buffers",) not in sections["local"].keys() | sections["recalibrate"].keys()
    assert all(s[("dense",)] == messages * 4 * 1120 for s in sections.values())


def test_seed_and_hash_travel_once_to_each_client_and_are_booked(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *BN, "cohort.size=5", "data.clients=5", "rounds=3")
    rows = report.ledger.to_table().to_pylist()
    told = [(row["round"], row["client"], row["payload_bytes"]) for row in rows if row["section"] == "auxiliary"]
    assert told == [(1, client, 16) for client in range(5)]


@pytest.mark.parametrize(("statistics", "limit"), [("local", 6_400), ("average", 12_700)])
def test_a_resnet20_payload_is_kilobytes(tmp_path: Path, statistics: str, limit: int) -> None:
    asked = ["model.name=resnet20", "model.trainable=batchnorm", f"model.statistics={statistics}"]
    report = run_tiny(tmp_path, *FOUR, *asked, "rounds=2", "training.steps=1")
    for direction in ("up", "down"):
        total = report.ledger.total(by=("direction",))[(direction,)]
        assert total / (2 * 4) <= limit
    assert report.summary["dense_total_bytes"] > 16 * 1_088_000
    assert report.summary["saving"] > 0.98


@pytest.mark.parametrize(
    "overrides",
    [
        ["client=clients.presets:fedprox"],
        ["client=clients.presets:topk", "wire.error_feedback=true"],
        ["client=clients.presets:topk", "model.trainable=batchnorm+head"],
        ["strategy=strategies.presets:fedavg", "strategy.momentum=0.9"],
        ["strategy=strategies.presets:global_magnitude", "model.trainable=batchnorm+head"],
        ["wire.uplink.content=difference", "wire.uplink.values=int8", "model.trainable=batchnorm+head"],
        ["model.trainable=random"],
        ["model.name=cnn_bn", "model.trainable=*"],
    ],
    ids=lambda o: " ".join(o),
)
def test_other_methods_compose(tmp_path: Path, overrides: list[str]) -> None:
    report = run_tiny(tmp_path, *FOUR, *BN, *overrides)
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    assert report.summary["saving"] >= 0
    assert report.rounds[-1]["clients"] == 4


def test_other_frozen_weights_are_refused_in_plain_words() -> None:
    model = models.build("resnet8", seed=1)
    models.freeze(model, "batchnorm")
    named = dict(model.named_parameters())
    frozen = {n: p for n, p in snapshot(model).items() if n in named and not named[n].requires_grad}
    schema = codecs.Schema.of({n: p for n, p in snapshot(model).items() if n not in frozen}, [])
    exchange = Exchange(schema, frozen=Frozen(1, Frozen.digest_of(frozen)))

    def made(seed: int) -> Params:
        other = snapshot(models.build("resnet8", seed=seed))
        return {name: other[name] for name in frozen}

    resident = Resident(models.build("resnet8", seed=7), exchange, made)
    assert resident.receive(exchange.frozen, None) == exchange.frozen
    assert torch.equal(resident.model.get_parameter("conv1.weight"), frozen["conv1.weight"])
    with pytest.raises(WrongFrozenWeights, match=r"seed 2 have hash [0-9a-f]{16}, the server's [0-9a-f]{16}"):
        resident.receive(Frozen(2, Frozen.digest_of(frozen)), None)
    with pytest.raises(WrongFrozenWeights, match="never told"):
        resident.receive(None, None)


def meddler(task: Task, ctx: ClientContext) -> Update:
    """Changes a weight that is frozen."""
    with torch.no_grad():
        ctx.model.fc.bias.add_(1.0)
    return Update(snapshot(ctx.model), ctx.num_examples)


def test_a_client_that_changes_frozen_weights_is_refused_and_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [*BN, "rounds=3", "faults.max_share=1.0", f"client={__name__}:sometimes_meddling"]
    report = run_tiny(tmp_path, *asked)
    assert report.summary["failures"]["raised"] > 0
    reasons = [message for message in caplog.messages if message.startswith("round ")]
    assert len(reasons) == report.summary["failures"]["raised"]
    assert all("frozen weights changed: 'fc.bias'" in reason for reason in reasons)
    assert any(row["clients"] > 0 for row in report.rounds)
    clean = load_file(report.folder / "model.safetensors")
    experiment = tiny(tmp_path, *asked)
    start = snapshot(make_model(experiment, load_data("digits"), experiment.seed)[0])
    assert torch.equal(clean["fc.bias"], start["fc.bias"])


def sometimes_meddling(task: Task, ctx: ClientContext) -> Update:
    """Meddles in half of the cases; otherwise trains, and checks what it was given."""
    if ctx.seed % 2:
        return meddler(task, ctx)
    assert ctx.model.fc.bias.abs().max() < 0.9, "another client's meddling is still there"
    Training(lr=0.1, steps=1).fit(ctx.model, ctx.data, rng=ctx.rng)
    return Update(snapshot(ctx.model), ctx.num_examples)


def test_recalibration_gives_the_statistics_of_the_data() -> None:
    data = load_data("digits")
    model = models.build("cnn_bn", in_channels=1, image_size=8)
    recalibrate(model, data.validation, batch_size=len(data.validation))
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    images, _ = next(data.validation.batches(len(data.validation)))
    out = conv(images)
    assert torch.allclose(first.running_mean, out.mean(dim=(0, 2, 3)), atol=1e-6)
    assert torch.allclose(first.running_var, out.var(dim=(0, 2, 3)), rtol=1e-4)
    assert model.training
    assert first.momentum == 0.1


def test_local_statistics_stay_with_their_client(tmp_path: Path) -> None:
    asked = [*BN, "model.statistics=local", "evaluate.clients=4", "data.clients=4", "cohort.size=4"]
    rows = run_tiny(tmp_path, *asked).ledger.to_table().to_pylist()
    assert not any(row["section"] == "buffers" and row["payload_bytes"] for row in rows)
    with pytest.raises(UserError, match=r"evaluate.clients > 0 needs model.statistics = 'average' or 'local'"):
        tiny(tmp_path, *BN, "model.statistics=recalibrate", "evaluate.clients=4")


def test_features_that_training_disabled_are_counted() -> None:
    model = models.build("resnet8")
    with torch.no_grad():
        model.bn1.weight[:4] = torch.tensor([0.0, 0.009, -0.009, 0.02])
    assert models.disabled_features(model)["bn1"] == 3 / 16
    assert models.disabled_features(model, threshold=0.05)["bn1"] == 4 / 16


def test_resnet866_trains_a_step() -> None:
    grey = models.build("resnet866", in_channels=1, image_size=8)
    models.initialise(grey, "uniform", seed=0)
    names, named = models.freeze(grey, "batchnorm"), dict(grey.named_parameters())
    assert sum(named[n].numel() for n in names) == 64_736
    metrics = local_sgd(grey, load_data("digits").train, lr=0.01, steps=1, batch_size=2)
    assert metrics["steps"] == 1
    assert grey.conv1.weight.grad is None
