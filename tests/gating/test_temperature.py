"""The temperature of learned gates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fl_sim import Experiment, run
from fl_sim.core.types import UserError
from fl_sim.gating import Gated, Gating, gate
from fl_sim.gating.skipping import skipping
from fl_sim.models import build
from fl_sim.training.model_file import read_model

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
DIGITS = Path(__file__).parents[2] / "configs" / "digits_adaptive.toml"


def gated(temperature: float, keep: float = 0.5) -> Gated:
    return gate(build("cnn_bn", in_channels=1, image_size=8), keep, seed=1, temperature=temperature).eval()


def logits(model: Gated, x: Tensor) -> Tensor:
    """Of the first gate, by the formula."""
    (first, *_) = model.gates.values()
    linear = first.salience.linear
    s = x.abs().mean(dim=(2, 3))
    return s / s.mean(dim=1, keepdim=True) @ linear.weight.T + linear.bias


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_factor_is_twice_the_sigmoid_of_the_logits_over_the_temperature(temperature: float) -> None:
    model = gated(temperature)
    (first, *_) = model.gates.values()
    x = torch.rand(4, first.salience.linear.in_features, 8, 8, generator=torch.Generator().manual_seed(2))
    z = torch.ones(4, first.channels, 8, 8)
    out = first(x, z, torch.ones(1))[:, :, 0, 0]
    wanted = 2 / (1 + torch.exp(-logits(model, x) / temperature))
    on = first.mask
    assert on is not None
    assert torch.allclose(out[on], wanted[on], atol=1e-6)
    assert not out[~on].any()


def test_it_changes_no_choice_of_gates_that_have_not_learned() -> None:
    choices = []
    for temperature in (0.5, 1.0, 4.0):
        model = gated(temperature)
        with torch.no_grad():
            model(IMAGES)
        choices.append(next(iter(model.masks().values())))  # of the first gate: later ones see what it scales
    assert all(torch.equal(one, choices[0]) for one in choices)


def test_skipping_has_the_same_temperature() -> None:
    model = gated(0.3)
    with torch.no_grad():
        wanted = torch.cat([model(image[None]) for image in IMAGES])
        fast = torch.cat([skipping(model)(image[None]) for image in IMAGES])
        other = torch.cat([gated(1.0)(image[None]) for image in IMAGES])
    assert torch.allclose(fast, wanted, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(other, wanted, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-4])
def test_what_is_no_temperature_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match=r"gating\.temperature = .*: must be at least 0\.001 and at most 1000"):
        Gating(temperature=bad)


@pytest.mark.parametrize("salience", ["gate_relu", "weight", "activation", "taylor"])
def test_gates_without_logits_refuse_it(salience: str) -> None:
    with pytest.raises(UserError, match=r'temperature = 2\.0: only gating\.salience = "gate" has one'):
        Gating(salience=salience, temperature=2.0)
    Gating(salience=salience, temperature=1.0)


def test_a_run_trains_at_it_and_its_model_file_keeps_it(tmp_path: Path) -> None:
    few = ["rounds=1", "data.clients=4", "cohort.size=2", "training.epochs=1", "evaluate.every=1"]

    def trained(temperature: float) -> Gated:
        options = [*few, f"gating.temperature={temperature}", f'out="{tmp_path / str(temperature)}"']
        loaded = read_model(run(Experiment.load(DIGITS, options)).folder / "model.safetensors")
        assert isinstance(loaded, Gated)
        return loaded

    sharp, plain = trained(0.25), trained(1.0)
    assert {one.salience.temperature for one in sharp.gates.values()} == {0.25}
    assert not all(torch.equal(value, plain.state_dict()[name]) for name, value in sharp.state_dict().items())
