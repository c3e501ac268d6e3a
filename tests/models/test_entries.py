"""Which tensors of a model travel, under which names, with which values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import special
import torch
from federation import run_tiny, tiny
from safetensors.torch import save_file
from torch import nn

from fl_sim import models
from fl_sim.core.types import Params, UserError
from fl_sim.models.parameters import COUNTER, canonical, entries, frozen, load, snapshot, tensors
from fl_sim.runtime.client.fixed_weights import Resident, WrongFrozenWeights
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.starting_model import untravelled

SMALL = ("data.clients=4", "cohort.size=3", "training.steps=2", "training.batch_size=16")


def built(name: str) -> nn.Module:
    """A model of `special`, as a run builds it."""
    return models.build(f"special:build_{name}", in_channels=1, image_size=8)


def federation(out: Path, name: str, *overrides: str) -> Federation:
    """A federation that trains a model of `special`."""
    return Federation.build(tiny(out, f"model.name=special:build_{name}", *SMALL, *overrides))


@pytest.mark.parametrize("name", ["cnn", "cnn_bn", "mlp", "resnet8", "mobilenet_v1", "densenet121", "fastgrnn"])
def test_of_ordinary_models_the_state_dict_travels_but_for_counters(name: str) -> None:
    model = models.build(name)
    expected = {n: v for n, v in model.state_dict(keep_vars=True).items() if not n.endswith(COUNTER)}
    found = entries(model)
    assert list(found) == list(expected) == list(tensors(model)) == list(snapshot(model))
    assert all(found[n] is v for n, v in expected.items())


@pytest.mark.parametrize(
    ("name", "middle"),
    [
        ("tied", {"middle.0.weight", "middle.0.bias", "middle.2.bias"}),
        ("shared_module", {f"middle.0.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")}
         | {"middle.0.1.running_mean", "middle.0.1.running_var"}),
        ("weight_norm_old", {"middle.bias", "middle.weight_g", "middle.weight_v"}),
        ("weight_norm", {"middle.bias", *(f"middle.parametrizations.weight.original{i}" for i in (0, 1))}),
        ("spectral_norm_old", {"middle.bias", "middle.weight_orig", "middle.weight_u", "middle.weight_v"}),
        ("spectral_norm", {"middle.bias", *(f"middle.parametrizations.weight.{n}" for n in ("original", "0._u", "0._v"))}),
        ("own_norm", {"middle.center"}),
        ("extra_state", set()),
        ("own_state_dict", set()),
        ("causal", set()),
        ("table", set()),
        ("integer_buffer", set()),
        ("double_buffer", set()),
        ("integer_parameter", set()),
        ("half_layer", {"middle.inner.weight", "middle.inner.bias"}),
    ],
)  # fmt: skip
def test_of_special_models_each_tensor_that_training_changes_travels_once(
    tmp_path: Path, name: str, middle: set[str]
) -> None:
    schema = federation(tmp_path, name).first.exchange.schema
    assert set(schema.names) == {"first.weight", "first.bias", "head.weight", "head.bias"} | middle
    assert set(schema.dtypes) == {torch.float32}


def test_statistics_of_any_name_are_in_the_section_of_statistics(tmp_path: Path) -> None:
    assert federation(tmp_path, "own_norm").first.exchange.schema.buffers == ("middle.center",)


def test_layers_that_share_a_weight_are_sent_and_counted_once(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "model.name=special:build_tied", *SMALL)
    pixels, hidden = special.PIXELS, special.HIDDEN
    count = (pixels + 1) * hidden + hidden * hidden + 2 * hidden + (hidden + 1) * 10
    assert report.summary["params"] == count
    assert sum(value.numel() for value in report.params.values()) == count
    model = load(built("tied"), report.params)
    assert torch.equal(model.get_parameter("middle.2.weight"), report.params["middle.0.weight"])


def test_a_mask_of_a_shared_weight_holds_for_both_layers(tmp_path: Path) -> None:
    mask = ("strategy.target=strategies.presets:global_magnitude", "strategy.density=0.3")
    report = run_tiny(tmp_path, "model.name=special:build_tied", *SMALL, *mask)
    weights = [report.params[name] for name in ("first.weight", "middle.0.weight", "head.weight")]
    alive = sum(int(weight.count_nonzero()) for weight in weights)
    assert alive == round(0.3 * sum(weight.numel() for weight in weights))
    assert report.summary["density"]["prunable"] == pytest.approx(0.3, abs=1e-3)


def test_a_shared_name_that_is_no_entry_is_refused_with_the_name_that_is() -> None:
    model = built("tied")
    assert canonical(model)["middle.2.weight"] == "middle.0.weight"
    with pytest.raises(
        ValueError, match=r"no entry 'middle.2.weight': it is shared, and its name is 'middle.0.weight'"
    ):
        load(model, {"middle.2.weight": torch.zeros(16, 16)})


@pytest.mark.parametrize("pattern", ["middle.2.weight", "middle.2.*+head", "middle.*"])
def test_model_trainable_takes_any_name_of_a_shared_weight(pattern: str) -> None:
    model = built("tied")
    assert "middle.0.weight" in models.freeze(model, pattern)


@pytest.mark.parametrize("name", ["frozen_backbone", "tied_frozen", "half_frozen", "double_frozen", "complex_frozen"])
def test_what_the_builder_froze_stays_and_does_not_travel(tmp_path: Path, name: str) -> None:
    fixed = frozen(Federation.build(tiny(tmp_path, f"model.name=special:build_{name}", *SMALL)).first.model)
    report = run_tiny(tmp_path / "run", f"model.name=special:build_{name}", *SMALL)
    assert fixed
    assert fixed.keys().isdisjoint(report.params)
    assert report.summary["trainable_params"] == report.summary["params"] - sum(v.numel() for v in fixed.values())
    told = 16 * 4  # the digest of what is frozen, once a client
    assert (
        report.summary["dense_total_bytes"] < report.summary["total_bytes"] < report.summary["dense_total_bytes"] + told
    )


def test_a_pattern_that_selects_frozen_parameters_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.trainable = 'first.\*': the model's builder froze .*'first.weight'"):
        federation(tmp_path, "frozen_backbone", "model.trainable=first.*")
    kept = federation(tmp_path, "frozen_backbone", "model.trainable=head").first.model
    assert {n for n, p in kept.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


Change = Callable[[nn.Module], object]


@pytest.mark.parametrize(
    ("name", "entry", "change"),
    [
        ("frozen_backbone", "first.weight", lambda p: p.add_(1)),
        ("integer_parameter", "middle.exact", lambda p: p.add_(1)),
        ("bool_parameter", "middle.alive", lambda p: p.logical_not_()),
        ("double_frozen", "middle.inner.weight", lambda p: p.add_(1e-12)),
        ("half_frozen", "middle.inner.bias", lambda p: p.add_(1)),
        ("complex_frozen", "middle.roots", lambda p: p.mul_(1j)),
    ],
)
def test_a_client_that_changes_a_frozen_parameter_of_any_dtype_is_told(
    tmp_path: Path, name: str, entry: str, change: Change
) -> None:
    made = federation(tmp_path, name).first
    other = federation(tmp_path, name).first.model
    resident = Resident(made.model, made.exchange, lambda seed: untravelled(other, made.exchange))
    announced = made.exchange.frozen
    assert announced is not None
    resident.receive(announced, None)
    resident.enter({})
    assert resident.leave() == {}
    before = made.model.get_parameter(entry).detach().clone()
    resident.enter({})
    with torch.no_grad():
        change(made.model.get_parameter(entry))
    with pytest.raises(WrongFrozenWeights, match=rf"changed: '{re.escape(entry)}'; .*forward pass changes as buffers"):
        resident.leave()
    resident.receive(announced, None)
    assert torch.equal(made.model.get_parameter(entry), before)


@pytest.mark.parametrize("engine", ["inline", "workers"])
@pytest.mark.parametrize("name", ["integer_buffer", "integer_parameter"])
def test_integers_arrive_exactly(tmp_path: Path, name: str, engine: str) -> None:
    """1234567891 became 1234567936, the next float32."""
    options = (f"model.name=special:build_{name}", "client=special:looks_at_integers", f"engine={engine}")
    report = run_tiny(tmp_path, *options, *SMALL)
    assert not any(report.summary["failures"].values())
    assert not any(key.endswith("exact") for key in report.params)


def test_half_precision_arrives_exactly() -> None:
    model = built("half")
    params = snapshot(model)
    assert params.flat.dtype == torch.float32
    other = models.build("special:build_half", in_channels=1, image_size=8, seed=1)
    assert all(torch.equal(v, model.get_parameter(n)) for n, v in load(other, params).named_parameters())


def test_a_snapshot_of_what_float32_does_not_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"model entry '0.weight' is float64"):
        snapshot(nn.Sequential(nn.Linear(2, 2)).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_given_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    params: Params = dict(snapshot(models.build("mlp", in_channels=1, image_size=8)))
    name = next(iter(params))
    params[name] = torch.full_like(params[name], value)
    path = tmp_path / "weights.safetensors"
    save_file(params, path)
    with pytest.raises(UserError, match=rf"weights.safetensors: '{name}' holds NaN or infinity"):
        Federation.build(tiny(tmp_path, "model.name=mlp", f'model.weights="{path}"'))


def test_a_builders_default_dtype_does_not_stay() -> None:
    with pytest.raises(UserError, match=r"'first.weight' is float64"):
        built("double_by_default")
    assert torch.get_default_dtype() == torch.float32


def test_a_builders_evaluation_mode_is_said_by_the_server_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = tiny(tmp_path, "model.name=special:build_evaluating_norm")
    Federation.build(asked, quiet=True)
    Federation.build(asked)
    assert [record.getMessage() for record in caplog.records] == [
        "model.name = 'special:build_evaluating_norm': its builder put 'middle' into evaluation mode; clients train in "
        "training mode, so BatchNorm uses each batch's statistics and dropout draws there"
    ]
