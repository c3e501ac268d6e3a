"""Channel pruning on clients where the filters are frozen: what does not travel needs no retained mask."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_sim import Experiment, run

CLIENTS = (
    "client={target='clients.presets:adaptive_pruning', extent='rows_and_columns'}",
    "client=clients.presets:magnitude_channels",
    "client=clients.presets:random_channels",
    "client=clients.presets:active_channels",
)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_round_with_frozen_filters(tmp_path: Path, client: str) -> None:
    asked = ["rounds=1", "training.steps=1", "data.clients=4", "cohort.size=2", "evaluate.every=1", f'out="{tmp_path}"']
    report = run(Experiment.load("configs/digits_adaptive.toml", [*asked, "model.trainable=batchnorm+head", client]))
    assert report.results.failed == 0
    assert report.ledger.total(by=("direction",))[("up",)] > 0
    assert not any(name.endswith("conv.weight") for name in report.params)
