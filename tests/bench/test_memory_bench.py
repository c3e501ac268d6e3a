"""The measure of a large model's memory, and its bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fl_sim.bench import memory
from fl_sim.core.large import is_large
from fl_sim.models.simple import cnn


def test_the_model_has_as_many_parameters_as_asked(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = cnn(num_classes=10, in_channels=3, image_size=32, width=memory.width_of(100))
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(100e6, rel=0.005)
    asked = memory.Load(client="sgd", clients=2).experiment(str(tmp_path), width=0.5)
    assert (asked.model.width, asked.cohort.size, asked.engine) == (0.5, 2, "inline")


@pytest.mark.slow
@pytest.mark.parametrize("client", memory.CLIENTS)
def test_a_run_of_a_large_model_takes_five_times_its_memory_at_most(client: str) -> None:
    found = memory.over_model(memory.Load(millions=60, clients=2, client=client))
    assert is_large(4 * int(found["parameters"]))
    assert 3 <= found["peak_over_model"] <= 5


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clients_of_a_round() -> None:
    found = memory.over_model(memory.Load(millions=10, clients=40))
    assert found["peak_over_model"] <= 15  # 46 to 50 where freed memory is kept whatever a round leaves in holes
