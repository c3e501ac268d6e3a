"""The box on top of a page: what the experiment was, from its config, summary and identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from federation import run_tiny

from fl_sim import Report, UserError
from fl_sim.report.experiment_facts import UNKNOWN, facts, told_apart
from fl_sim.report.groups import grouped
from fl_sim.report.page import page
from fl_sim.report.times import OWN, networks, time_to_accuracy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """Dense without a network, sparse with one."""
    out = tmp_path_factory.mktemp("runs")
    sparse = ("name=topk", "client=clients.presets:topk", "client.density=0.05", "network.links.4G=1")
    return [run_tiny(out, "model.name=mlp", *extra) for extra in ((), (*sparse, "wire.error_feedback=true"))]


def test_the_box_says_what_the_experiment_was(runs: list[Report]) -> None:
    told = facts(runs[1])
    assert told["data"] == "digits"
    assert told["partition"] == "6 clients, dirichlet, alpha = 0.5"
    assert told["model"].startswith(f"mlp, {runs[1].results.params:,} parameters")
    assert told["cohort"] == "3 of 6 clients a round, 2 rounds"
    assert told["client"] == "clients.presets:topk, density = 0.05"
    assert told["strategy"] == "strategies.presets:fedavg"
    assert told["training"] == "learning rate 0.1, sgd, 2 steps a round, batches of 8, constant schedule"
    assert told["codecs"] == "up float32 parameters; down float32 parameters, error feedback"
    assert "4G = 1" in told["network"]
    identity = json.loads((runs[1].folder / "identity.json").read_text())
    assert told["data hash"] == identity["data"][:16]
    assert identity["code"]["client"]["clients/presets.py"][:8] in told["code"]


def test_other_settings_are_told(tmp_path: Path) -> None:
    settings = ("data.partition=shards", "data.shards=3", "training.steps=5", "wire.uplink.values=int8")
    told = facts(run_tiny(tmp_path, "rounds=1", "model.name=mlp", "wire.uplink.content=difference", *settings))
    assert told["partition"] == "6 clients, shards, shards = 3"
    assert "5 steps a round" in told["training"]
    assert told["codecs"].startswith("up int8 difference; down float32")
    assert told["network"] == "no virtual clock"


def test_groups_share_what_is_the_same(runs: list[Report]) -> None:
    shared, differing = told_apart(grouped(runs))
    assert dict(shared)["data"] == "digits"
    assert {row[0] for row in differing} == {"client", "codecs", "network"}
    assert {name for name, _ in shared}.isdisjoint(row[0] for row in differing)


def test_an_older_folder_has_no_hashes_and_a_damaged_one_is_refused(runs: list[Report], tmp_path: Path) -> None:
    shutil.copytree(runs[0].folder, tmp_path / "run")
    (tmp_path / "run" / "identity.json").write_text('{"code": 3}')
    with pytest.raises(UserError, match=r"identity\.json"):
        facts(Report.load(tmp_path / "run"))
    (tmp_path / "run" / "identity.json").unlink()
    assert facts(Report.load(tmp_path / "run"))["code"] == UNKNOWN


def test_the_runs_own_network_comes_first(runs: list[Report]) -> None:
    dense, sparse = runs
    assert next(iter(networks(grouped([sparse])))) == OWN
    assert OWN not in networks(grouped([dense]))
    headings, rows = time_to_accuracy(grouped([sparse]))
    own = sparse.results.time_to_accuracy
    reached = [level for level, size in sparse.results.bytes_to_accuracy.items() if size is not None][-6:]
    assert headings == ["run", "network", *(f"to {100 * float(level):.0f} % [s]" for level in reached)]
    assert rows[0] == ["topk", OWN, *(f"{own[level]:.1f}" for level in reached)]
    assert [row[1] for row in rows] == [OWN, "3G", "4G", "Wi-Fi"]


def test_losses_and_validation_are_drawn_where_recorded(runs: list[Report]) -> None:
    text = page(grouped(runs[:1]))
    for button in ("test", "validation", "training"):
        assert f">{button}</button>" in text
    assert ">clients, mean</button>" not in text
    assert "<details><summary><h2>Estimates" in text


def test_the_clients_accuracies_are_recorded_and_drawn(tmp_path: Path) -> None:
    """Of clients that evaluate: percentiles in which each counts once; they are ordered and hold the mean's neighbours."""
    report = run_tiny(tmp_path, "model.name=mlp", "evaluate.clients=6")
    for row in report.rounds:
        low, middle, high = (row[f"clients_accuracy_p{share}"] for share in (10, 50, 90))
        assert 0 <= low <= middle <= high <= 1
    assert low < high
    text = page(grouped([report]))
    for button in ("clients, mean", "clients, lowest tenth", "clients, median", "clients, highest tenth"):
        assert f">{button}</button>" in text
