"""One list says which keys make no other experiment: a run's id and the groups of a report agree on every key."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import tiny
from summaries import summary

from fl_sim.communication.ledger import Ledger
from fl_sim.config import INDIFFERENT, Experiment
from fl_sim.report import Report
from fl_sim.report.groups import grouped

OVERRIDES = {
    "name": "name=other",
    "engine": "engine=workers",
    "out": "out=elsewhere",
    "device": "device=cpu",
    "ray": "ray.workers=3",
    "workers": "workers.count=3",
    "checkpoint": "checkpoint.every=5",
    "faults": "faults.max_share=0.9",
    "seed": "seed=5",
    "rounds": "rounds=9",
    "training": "training.lr=0.7",
    "wire": "wire.error_feedback=true",
    "network": "network.links.4G=1",
}


def reported(experiment: Experiment, folder: Path) -> Report:
    """What a finished run of the experiment leaves, as far as grouping reads it."""
    folder.mkdir()
    (folder / "config.toml").write_text(experiment.to_toml(), encoding="utf-8")
    return Report(folder, summary(seed=experiment.seed), [], Ledger(), {})


@pytest.mark.parametrize("key", OVERRIDES)
def test_id_and_groups_agree(key: str, tmp_path: Path) -> None:
    one, other = tiny(tmp_path), tiny(tmp_path, OVERRIDES[key])
    assert one != other
    assert (one.id == other.id) == (key in INDIFFERENT)
    groups = grouped([reported(one, tmp_path / "one"), reported(other, tmp_path / "other")])
    assert (len(groups) == 1) == (key in INDIFFERENT or key == "seed")


def test_every_key_that_is_indifferent_is_a_key_and_is_tried() -> None:
    assert Experiment.model_fields.keys() >= INDIFFERENT
    assert OVERRIDES.keys() > INDIFFERENT
