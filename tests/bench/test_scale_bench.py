"""The measures of scale, on small federations: what they report, not how fast anything is."""

from __future__ import annotations

import pytest
import torch

from fl_sim.bench import scale
from fl_sim.models.simple import cnn


@pytest.mark.slow
def test_each_measure_reports_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    few = scale._many

    def fewer(clients: int, cohort: int, place: str) -> object:
        return few(clients // 1000, max(1, cohort // 100), place)

    monkeypatch.setattr(scale, "_many", fewer)
    monkeypatch.setattr(scale, "LARGE_WIDTH", 0.2)
    found = {name: value for measure in scale.MEASURES.values() for name, value in measure().items()}
    assert found.keys() == {
        "million_build_s",
        "million_build_mb",
        "million_run_s",
        "million_run_mb",
        "round_of_5000_s",
        "large_parameters",
        "large_peak_over_model",
    }
    assert all(value >= 0 for value in found.values())


def test_the_large_model_has_a_hundred_million_parameters() -> None:
    with torch.device("meta"):
        model = cnn(num_classes=10, in_channels=3, image_size=32, width=scale.LARGE_WIDTH)
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(100e6, rel=0.02)
