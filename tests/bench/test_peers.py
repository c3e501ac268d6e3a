"""Other libraries beside ours: the folder that they read, the lines that they print, refusals, and real peers."""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fl_sim import models
from fl_sim.bench import peer_folder, peer_run, peer_table
from fl_sim.bench.bare import Bare
from fl_sim.bench.peer_folder import Settings, layers_of, write
from fl_sim.bench.peer_run import PEERS, Installed, asked, installed, seconds_of
from fl_sim.bench.peer_table import CONTESTS, Contest, difference, require_same, settings_of
from fl_sim.bench.show import rows_as_markdown
from fl_sim.bench.workloads import TINY_MLP, Workload
from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation

SMALL = Workload("cnn", clients=8, cohort=2, steps=2, width=0.05, batch=4)
CONTEST = Contest(SMALL, (("inline", "float32"),), rounds=2, held=8)
DENSE = Contest(TINY_MLP, (("inline", "float32"),), rounds=2, held=256)
SETTINGS = Settings((("Flatten",), ("Linear", 2, 3)), 8, 2, 4, 2, 0.1, 2, warmup=1, rounds=2, dropout=True)


def line(fits: object, seconds: object) -> str:
    return f"ROUND {json.dumps({'fits': fits, 'seconds': seconds})}"


def python_that(tmp_path: Path, *options: str) -> str:
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(options)} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_the_layers_make_the_same_network(name: str) -> None:
    from fl_sim.bench.peers.with_flower import network

    model = models.build(name, in_channels=1, image_size=8, width=0.2).eval()
    told = json.loads(json.dumps(layers_of(model)))
    twin = network(told, dropout=True)
    twin.load_state_dict(model.state_dict())
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(twin.eval()(images), model(images))
    assert [m.p for m in twin if isinstance(m, nn.Dropout)] == [0.25, 0.5][: 2 * (name == "cnn")]
    assert {m.p for m in network(told, dropout=False) if isinstance(m, nn.Dropout)} <= {0.0}


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(2, 2, bias=False)])
def test_layers_that_no_peer_is_told_of_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UserError, match="plain Conv2d, Linear"):
        layers_of(nn.Sequential(layer))


def test_the_folder_has_the_clients_samples_in_their_order_and_the_same_start(tmp_path: Path) -> None:
    federation = Federation.build(SMALL.on("inline"))
    write(tmp_path, federation, settings_of(CONTEST, clients=5, warmup=1, rounds=2, dropout=True))
    told = json.loads((tmp_path / "work.json").read_text())
    asked_of = {"clients": 5, "cohort": 2, "batch": 4, "steps": 2, "lr": 0.1, "warmup": 1, "rounds": 2, "dropout": True}
    assert {key: told[key] for key in asked_of} == asked_of
    with np.load(tmp_path / "data.npz") as data:
        inputs, targets = data["inputs"], data["targets"]
    assert (inputs.shape, inputs.dtype, targets.shape) == ((5, 8, 3, 32, 32), np.float32, (5, 8))
    mine = federation.data.train.subset(federation.partitions[3])
    assert all(np.array_equal(inputs[3, i], mine[i][0].numpy()) for i in range(8))
    assert targets[3].tolist() == [mine[i][1] for i in range(8)]
    initial = peer_folder.read(tmp_path / "initial.npz")
    assert initial.keys() == federation.first.initial.keys()
    assert all(np.array_equal(value, federation.first.initial[name].numpy()) for name, value in initial.items())


def test_a_client_with_too_few_samples_is_refused(tmp_path: Path) -> None:
    federation = Federation.build(SMALL.on("inline", overrides=["data.clients=49900"]))
    with pytest.raises(UserError, match="client 0 has 1 samples; needed: 8, for 2 steps"):
        write(tmp_path, federation, settings_of(CONTEST, clients=2, warmup=0, rounds=1, dropout=True))


def test_clients_of_every_contest_weigh_the_same() -> None:
    for contest in CONTESTS.values():
        federation = Federation.build(contest.work.on("inline"), quiet=True)
        assert set(federation.sizes) == {50}
        assert contest.held <= len(federation.sizes)


def test_the_limit_of_the_mlp_trains_it() -> None:
    bare = Bare.of(TINY_MLP)
    assert (bare.shape, bare.clients) == ((1, 8, 8), 256)
    seen: list[torch.Size] = []
    forward = nn.Linear.forward
    try:
        nn.Linear.forward = lambda self, x: seen.append(self.weight.shape) or forward(self, x)  # type: ignore[method-assign]
        bare.start()(1)
    finally:
        nn.Linear.forward = forward  # type: ignore[method-assign]
    assert seen == [(32, 64), (10, 32)] * 5


def test_peers_are_asked_for_by_name_and_python() -> None:
    assert asked("pfl=/a/python,flower") == {"pfl": "/a/python", "flower": sys.executable}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tff", "--with 'tff': allowed: pfl, flower, fedjax"),
        ("pfl=", "--with 'pfl=': a path to a Python is missing"),
        ("pfl,pfl=/a", "pfl is there twice"),
    ],
)
def test_what_is_no_peer_is_refused(text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        asked(text)


def test_a_peer_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no pfl; .*pip install 'pfl\[pytorch\]==0\.6\.0', then --with pfl=PLACE/bin"
    ):
        installed("pfl", python_that(tmp_path, "-S"))
    with pytest.raises(UserError, match="--with pfl=/nowhere/python: is no Python that runs"):
        installed("pfl", "/nowhere/python")


def test_versions_are_those_of_that_python() -> None:
    assert installed("flower", sys.executable).versions["torch"] == torch.__version__.partition("+")[0]


def test_works_are_chosen_and_others_refused() -> None:
    with pytest.raises(UserError, match="--work 'b1': allowed: b0, small, mlp"):
        peer_table.measure({}, ["b1"], turns=2)


def test_a_peer_that_can_run_none_of_the_works_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_run, "installed", lambda name, python: Installed(name, PEERS[name], python, {}))
    with pytest.raises(UserError, match="--with fedjax --work b0: it runs mlp"):
        peer_table.measure({"fedjax": "python"}, ["b0"], turns=2)


def test_seconds_are_those_of_the_timed_rounds() -> None:
    told = ["Metrics of pfl", line(2, 9.0), line(2, 0.5), "", line(2, 0.25)]
    assert seconds_of("pfl", told, SETTINGS) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([line(2, 1.0)] * 2, "pfl: told of 2 rounds instead of 3"),
        ([line(2, 1.0), line(1, 1.0), line(2, 1.0)], "pfl: round 2 had 1 client fits instead of 2"),
        (["ROUND nothing"] * 3, "pfl: cannot read its line 'ROUND nothing'"),
        (["ROUND {}"] * 3, "cannot read"),
        ([line(None, 1.0)] * 3, "cannot read"),
        ([line(2, 0.0)] * 3, "a round of 0.0 s"),
        ([line(2, float("nan"))] * 3, "a round of nan s"),
    ],
)
def test_lines_that_are_wrong_are_no_measurement(told: list[str], why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        seconds_of("pfl", told, SETTINGS)


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> Installed:
    monkeypatch.setattr(peer_run, "SCRIPTS", tmp_path)
    (tmp_path / "with_flower.py").write_text(program)
    return Installed("flower", PEERS["flower"], sys.executable, {})


def test_a_peer_is_given_the_folder_and_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stand_in(tmp_path, monkeypatch, f"import sys\nfor _ in range(3): print({line(2, 0.5)!r})\nprint(sys.argv[1])")
    assert peer_run.run(one, tmp_path, SETTINGS) == (0.5, 0.5)
    one = stand_in(tmp_path, monkeypatch, "import sys\nraise ValueError(sys.argv[1])")
    with pytest.raises(RuntimeError, match=f"^flower: ended with status 1: ValueError: {tmp_path}$"):
        peer_run.run(one, tmp_path, SETTINGS)


def test_a_peer_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_run, "LIMIT_S", 2)
    child = (
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    one = stand_in(tmp_path, monkeypatch, child)
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="flower: not done after 2 s"):
        peer_run.run(one, tmp_path, SETTINGS)
    assert time.perf_counter() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_parameters_are_compared_over_the_largest_change() -> None:
    before, ours = {"w": np.zeros(3, np.float32)}, {"w": np.array([0.0, 2.0, 1.0], np.float32)}
    near = {"w": ours["w"] + np.float32(1e-3)}
    assert difference("pfl", before, ours, near) == pytest.approx(5e-4, rel=1e-3)
    for theirs in (before["w"], ours["w"] + np.float32(3e-3), np.full(3, np.nan, np.float32)):
        with pytest.raises(RuntimeError, match=r"pfl: .*did not do the same work"):
            difference("pfl", before, ours, {"w": theirs})
    with pytest.raises(RuntimeError, match="pfl: its parameters are v"):
        difference("pfl", before, ours, {"v": ours["w"]})


def test_rows_are_speeds_over_the_limit_and_over_ours() -> None:
    taken = {"limit": [1.0, 2.0, 3.0], "fl-sim": [2.0, 2.0, 2.0], "pfl": [4.0, 5.0, 8.0]}
    limit, ours, pfl = peer_table._rows("b0", 10, taken)
    assert (limit.fits_per_s, ours.fits_per_s, pfl.fits_per_s) == (5.0, 5.0, 2.0)
    assert (ours.over_limit, pfl.over_limit) == (0.5, 0.2)
    assert (ours.ours_over, pfl.ours_over, pfl.ours_over_q1, pfl.ours_over_q3) == (1.0, 2.5, 2.25, 3.25)
    lines = rows_as_markdown([pfl]).splitlines()
    assert "torch" in lines[0]
    assert lines[-1].startswith("| b0 | pfl | 3 | 2 |")


def test_scripts_of_peers_import_nothing_of_ours() -> None:
    for name in PEERS:
        tree = ast.parse((peer_run.SCRIPTS / f"with_{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not [
            module for module in imported if module and module.split(".")[0] in ("fl_sim", "clients", "strategies")
        ]


def real(name: str) -> Installed:
    """A peer that FL_SIM_PEERS names, as --with has it; Flower is one of our own requirements."""
    named = os.environ.get("FL_SIM_PEERS", "flower")
    python = {"flower": sys.executable, **asked(named)}.get(name)
    if python is None:
        pytest.skip(f"{name} is not installed: FL_SIM_PEERS={name}=PYTHON names a Python that has it")
    return installed(name, python)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "contest"), [("pfl", CONTEST), ("flower", CONTEST), ("fedjax", DENSE)])
def test_a_real_peer_does_the_same_work(name: str, contest: Contest, tmp_path: Path) -> None:
    one = real(name)
    assert require_same(one, contest, tmp_path / "check") < 1e-4
    settings = settings_of(contest, clients=contest.held, warmup=1, rounds=2, dropout=True)
    write(tmp_path / "timed", Federation.build(contest.work.on("inline")), settings)
    assert len(peer_run.run(one, tmp_path / "timed", settings)) == 2
