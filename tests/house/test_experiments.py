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


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = script("convergence", monkeypatch)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("table", monkeypatch)


ARMS = [(setting, arm) for setting, own in PLAN["settings"].items() for arm in (*PLAN["arms"], *own.get("arms", ()))]


@pytest.mark.parametrize(("setting", "arm"), ARMS)
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
    number, _, so_far = row["curve"][-1]
    assert (number, so_far) == (2, row["summary"]["total_bytes"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three seeds of dense FedAvg, two of an arm a point better for a tenth of the bytes, and a run that chose a rate."""
    plan = [("dense", seed, 50.0 + seed, 1000) for seed in (0, 1, 2)]
    plan += [("sparse", seed, 51.0 + 3 * seed, 100) for seed in (0, 1)] + [("sparse", 10, 99.0, 100)]
    for arm, seed, end, size in plan:
        curve = [[number, end / 100 if number > 5 else 0.1, number * size * 1000] for number in range(1, 21)]
        moved = {"uplink_bytes": 15 * size * 1000, "downlink_bytes": 5 * size * 1000}
        row = {"arm": arm, "lr": 0.1, "seed": seed, "curve": curve}
        row["summary"] = {**moved, "macs": {"mean": 3, "dense": 4} if arm == "dense" else {"mean": 1, "dense": 2}}
        (tmp_path / f"T-{arm}-s{seed}.json").write_text(json.dumps(row))
    return tmp_path


def test_the_table_pairs_arms_with_dense_by_seed_and_says_where_seeds_are_few(table: ModuleType, rows: Path) -> None:
    shown = table.table(table.rows("T", 10, rows), ["dense", "sparse"])
    dense, sparse = (line.split(" | ") for line in shown.split("\n")[2:])
    share = ["100.00 ± 0.00", "15.0 ± 0.0", "100.00 ± 0.00", "100.00 ± 0.00", "75.0 ± 0.0 |"]
    # Both arms reach dense's end less a point with the fifteenth evaluation: the last ten are then those after the jump.
    assert dense == ["| `dense`", "0.1", "3", "51.0 ± 2.5", "51.0 ± 2.5", "", "15.0 ± 0.0", "5.0 ± 0.0", *share]
    # Differences are 1 and 3 points: 2 ± 12.706 * 1.414 / 1.414.
    assert sparse[2:6] == ["**2**", "52.5 ± 19.1", "52.5 ± 19.1", "2.0 ± 12.7"]
    assert sparse[8:] == ["10.00 ± 0.00", "1.5 ± 0.0", "10.00 ± 0.00", "–", "25.0 ± 0.0 |"]  # noqa: RUF001


def test_a_twin_stands_beside_the_arm_that_it_repeats(table: ModuleType, rows: Path) -> None:
    found = table.rows("T", 10, rows)
    assert table.sides(found, {"sparse": "dense"}) == "`sparse` ends 2.0 ± 12.7 points from `dense` (2 seeds: no claim)"
    assert table.sides(found, {"dense": "dense"}) == "`dense` ends 0.0 ± 0.0 points from `dense`"
    assert table.sides(found, {"missing": "dense"}) == ""


def test_a_twin_takes_the_rate_of_its_arm(queue: ModuleType) -> None:
    twin, arm = next(iter(PLAN["twins"].items()))
    names = [one.experiment.name for one in queue.missing(PLAN, "A", twin)]
    assert names == [f"A-{arm}-lr{rate:g}-tuning" for rate in PLAN["learning_rates"]]


def test_the_curves_of_the_table_are_drawn(table: ModuleType, rows: Path, tmp_path: Path) -> None:
    table.draw({"T": table.rows("T", 10, rows)}, tmp_path / "curves.html")
    text = (tmp_path / "curves.html").read_text()
    assert "sparse, seed 1" in text
    assert "sparse, seed 10" not in text


def test_each_arm_has_one_line(table: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one of all settings that a setting changes, as A changes `small_50`."""
    table.main([])
    for part in capsys.readouterr().out.split("Setting ")[1:]:
        arms = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| `")]
        assert arms
        assert len(arms) == len(set(arms))
