"""Builders are called once a model, and once more a run: for the dense baseline that nothing freezes or gates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import tiny
from torch import nn

from fl_sim import Experiment, run
from fl_sim.models import MODELS
from fl_sim.simulation.federation import Federation

built: list[float] = []
"""Widths of the models built since the test began."""


def counted(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """An mlp whose builder notes each call."""
    built.append(width)
    return MODELS["mlp"](num_classes=num_classes, input_shape=(in_channels, image_size, image_size), width=width)


@pytest.fixture(autouse=True)
def _from_zero() -> Iterator[None]:
    built.clear()
    yield
    built.clear()


def experiment(out: Path, *widths: float, **options: str) -> Experiment:
    """An experiment with a model of the first width, and one capacity for each of the others."""
    name, share = f"{__name__}:counted", 1 / len(widths)
    capacities = ", ".join(f'{{name = "{name}", width = {width}, share = {share}}}' for width in widths[1:])
    asked = [f'model.name="{name}"', f"model.width={widths[0]}", f"capacities=[{capacities}]"]
    return tiny(out, *asked, *(f"{key}={value}" for key, value in options.items()))


@pytest.mark.parametrize("widths", [[0.25], [0.25, 0.125], [0.5, 0.25, 0.125]])
def test_a_federation_builds_each_model_once(tmp_path: Path, widths: list[float]) -> None:
    federation = Federation.build(experiment(tmp_path, *widths))
    assert built == widths
    assert len(federation.tracks) == len(widths)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("widths", [[0.25], [0.25, 0.125]])
def test_a_run_builds_each_model_and_its_baseline_however_many_rounds(
    tmp_path: Path, widths: list[float], rounds: int
) -> None:
    run(experiment(tmp_path, *widths, rounds=str(rounds)))
    assert built == [*widths, *widths]
