"""`fl-sim bench density`: its rows are the pruned models, and a minimum prevents layer collapse."""

from __future__ import annotations

from math import isnan
from pathlib import Path

import pytest

from fl_sim.bench.density import Asked, Row, measure
from fl_sim.core.types import UserError
from fl_sim.models import build, prunable_names
from fl_sim.training import Training, snapshot
from fl_sim.training.model_file import write_model


def rows(tmp_path: Path, methods: str, density: float, training: Training | None = None) -> list[Row]:
    model = build("cnn_bn", in_channels=1, image_size=8)
    model.get_parameter("3.weight").data.mul_(1e-3)  # a global ranking empties this layer
    path = tmp_path / "m.safetensors"
    write_model(path, snapshot(model), {"name": "cnn_bn", "in_channels": 1, "image_size": 8, "num_classes": 10})
    asked = [Asked.of(text) for text in methods.split(",")]
    options = {"images": 4, "levels": 5, "precision": "float32", "training": training}
    return list(measure(path, "digits", methods=asked, densities=[density], **options))  # type: ignore[arg-type]


def test_a_minimum_prevents_the_collapse_that_a_global_ranking_brings(tmp_path: Path) -> None:
    plain, least = rows(tmp_path, "global,global+7", 0.05)
    assert (plain.empty, plain.fewest) == (1, 0)
    assert (least.empty, least.fewest) == (0, 7)
    assert plain.macs < least.macs < 1
    assert isnan(plain.retrained)


def test_every_method_is_pruned_tested_and_retrained(tmp_path: Path) -> None:
    found = rows(tmp_path, "uniform,erk,lamp,rd,random", 0.2, Training(lr=0.05, steps=20))
    assert len(found) == 5
    smallest = min(build("cnn_bn", in_channels=1).get_parameter(n).numel() for n in prunable_names(build("cnn_bn")))
    assert found[0].fewest == pytest.approx(0.2 * smallest, abs=1)
    assert all(row.retrained > row.one_shot for row in found)
    assert found[1] == rows(tmp_path, "erk", 0.2, Training(lr=0.05, steps=20))[0]


@pytest.mark.parametrize("text", ["gobal", "global+", "global+x"])
def test_unknown_methods_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--methods"):
        Asked.of(text)
