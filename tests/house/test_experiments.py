"""The queue of long experiments: every arm is a valid config, and a run leaves one row, once."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path("experiments")
PLAN = tomllib.loads((HERE / "settings.toml").read_text())
SMALL = [
    "data.source=digits",
    "model.name=cnn_bn",
    "rounds=2",
    "evaluate.every=1",
    "training.steps=1",
    "data.clients=4",
]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("convergence", HERE / "convergence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "convergence", module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.mark.parametrize("setting", PLAN["settings"])
@pytest.mark.parametrize("arm", PLAN["arms"])
def test_an_arm_is_a_valid_config_under_a_name_of_its_own(queue: ModuleType, setting: str, arm: str) -> None:
    made = queue.job(PLAN, setting, arm, 0.1, 0)
    assert made.experiment.name == f"{setting}-{arm}-lr0.1"
    dense = queue.job(PLAN, setting, "dense", 0.1, 0).experiment
    assert arm == "dense" or made.experiment.model_copy(update={"name": dense.name}) != dense


def test_validation_chooses_the_rate_and_a_finished_run_is_not_run_again(queue: ModuleType, tmp_path: Path) -> None:
    out = f'out="{tmp_path / "runs"}"'
    setting = {"config": "configs/quickstart.toml", "overrides": [*SMALL, out, "cohort.size=2"], "tuning_rounds": 1}
    plan = {
        "settings": {"T": setting},
        "arms": {"dense": []},
        "learning_rates": [1e-4, 0.1],
        "seeds": [0],
        "tuning_seed": 10,
    }
    plan["overrides"] = [out]
    ran = []
    for one in queue.missing(plan, "T", "dense"):
        ran.append((one.lr, one.seed))
        queue.write(one.row, queue.row_of(one, queue.run(one.experiment)))
    trials = queue.tuning(plan, "T", "dense")
    scores = {trial.lr: json.loads(trial.row.read_text())["validation_accuracy"] for trial in trials}
    best = max(sorted(scores), key=scores.__getitem__)
    assert ran == [(1e-4, 10), (0.1, 10), (best, 0)]
    assert list(queue.missing(plan, "T", "dense")) == []
    row = json.loads((tmp_path / "results" / f"T-dense-lr{best:g}-s0.json").read_text())
    assert sum(row["bytes"].values()) == row["summary"]["total_bytes"]
    assert [number for number, _ in row["curve"]][-1] == 2
