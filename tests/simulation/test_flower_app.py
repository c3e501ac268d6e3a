"""Experiments as Flower's runtimes run them: nodes are counted, results have a place of their own, wrong input is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from federation import tiny

from fl_sim import Experiment, Report, UserError, run
from fl_sim.runtime.flower_run import run_apps
from fl_sim.simulation import flower_app

CLIENTS = 6


def config(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_text(tiny(tmp_path / "out", "rounds=1", f"data.clients={CLIENTS}", "cohort.size=3").to_toml())
    return path


@contextmanager
def quick() -> Iterator[None]:
    """Nodes that are missing are not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flower_app.require_nodes, "__kwdefaults__", {"seconds": 0.0})
        yield


@pytest.mark.parametrize("nodes", [2, 8])
def test_another_number_of_nodes_than_clients_is_refused(
    tmp_path: Path, nodes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with quick(), pytest.raises(UserError, match=f"{nodes} nodes and the config data.clients = {CLIENTS}"):
        run_apps(flower_app.server, flower_app.client, num_clients=nodes, run_config={"config": str(config(tmp_path))})
    assert "data.clients" in caplog.text
    assert not (tmp_path / "out").exists()


def test_its_results_stand_beside_those_of_our_engines(tmp_path: Path) -> None:
    path = config(tmp_path)
    own = run(Experiment.load(path))
    before = (own.folder / "summary.json").read_bytes()
    run_apps(flower_app.server, flower_app.client, num_clients=CLIENTS, run_config={"config": str(path)})
    assert (own.folder / "summary.json").read_bytes() == before
    (other,) = set((tmp_path / "out").iterdir()) - {own.folder}
    flowers = Report.load(other)
    assert flowers.summary["engine"] == "flower"
    by = ("round", "direction", "phase", "client", "section")
    train = {"phase": "train"}
    assert flowers.ledger.total(by=by, where=train) == own.ledger.total(by=by, where=train)


@pytest.mark.parametrize(
    ("given", "match"), [({}, "run config lacks config"), ({"config": "nowhere.toml"}, "nowhere.toml")]
)
def test_a_missing_config_is_one_line(given: dict[str, str], match: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=match):
        run_apps(flower_app.server, flower_app.client, num_clients=2, run_config=given)
    (line,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "\n" not in line
