"""Trackers hear every round and change nothing; what they wrote is read back with their own readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import tiny

from fl_sim import Experiment, Report, UserError, run
from fl_sim.report.trackers import together, tracked

OWN = """
from contextlib import contextmanager
from fl_sim.report.trackers import EachRound

@contextmanager
def own(experiment, folder):
    with (folder / "heard.txt").open("w") as stream:
        yield EachRound(lambda number, row: stream.write(f"{number} {row['uplink_bytes']}\\n"))
        stream.write("closed")
"""


def run_tracked(experiment: Experiment, *names: str) -> Report:
    with tracked(names, experiment) as observers:
        return run(experiment, together(observers))


def test_tensorboard_holds_every_round(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = run(tiny(tmp_path / "plain"))
    report = run_tracked(tiny(tmp_path / "tracked"), "tensorboard")
    events = EventAccumulator(str(report.folder / "tensorboard")).Reload()
    read = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name in ("accuracy", "uplink_bytes"):
        assert read[name] == [(row["round"], pytest.approx(row[name], rel=1e-6)) for row in report.rounds]
    assert report.summary["params_sha256"] == plain.summary["params_sha256"]


def test_a_tracker_of_ones_own_and_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tracker.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = run_tracked(tiny(tmp_path), "own_tracker:own", "tensorboard")
    lines = [f"{row['round']} {row['uplink_bytes']}" for row in report.rounds]
    assert (report.folder / "heard.txt").read_text().splitlines() == [*lines, "closed"]
    assert (report.folder / "tensorboard").is_dir()


def test_an_unknown_tracker_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'tensorboard'"), tracked(["tensorbord"], tiny(tmp_path)):
        pass


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"fl-sim\[wandb\]"), tracked(["wandb"], tiny(tmp_path)):
        pass


@pytest.mark.slow
def test_mlflow_holds_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    report = run_tracked(tiny(tmp_path), "mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("fl-sim").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["data.clients"] == "6"
    history = client.get_metric_history(found.info.run_id, "accuracy")
    assert [(m.step, m.value) for m in history] == [(row["round"], row["accuracy"]) for row in report.rounds]


@pytest.mark.slow
def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    report = run_tracked(tiny(tmp_path), "wandb")
    (written,) = report.folder.rglob("*.wandb")
    assert b"uplink_bytes" in written.read_bytes()
