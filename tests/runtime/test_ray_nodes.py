"""A Ray cluster whose nodes are network namespaces: nodes, links and the head are lost, and the results stay what they were.

Where network namespaces are not allowed the tests say so and are skipped. `FL_SIM_NODE_KILLS=10` loses a node ten times.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import tomli_w
from federation import TINY, same
from held_client import HOLD
from ray_nodes import Nodes, cluster, finished, until, why_not

from fl_sim import Experiment, Report, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
OPTIONS = (
    "client.target=held_client:topk",
    "client.density=0.1",
    "wire.error_feedback=true",
    "data.clients=12",
    "cohort.size=8",
    "rounds=60",
    "evaluate.every=60",
)
KILLS = int(os.environ.get("FL_SIM_NODE_KILLS", "1"))
STALL_S = 45
"""A lost machine may hold up a round so long."""


@pytest.fixture(autouse=True, scope="module")
def _allowed() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def hold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """While this file exists, clients are slow."""
    file = tmp_path_factory.mktemp("hold") / "hold"
    with mock.patch.dict(os.environ, {HOLD: str(file)}):
        yield file


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, hold: Path) -> Report:
    return run(Experiment.from_tree(TINY, [f'out="{tmp_path_factory.mktemp("inline")}"', *OPTIONS]))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps({**TINY, "out": str(tmp_path / "runs")}))
    return path


def seconds(tmp_path: Path) -> list[float]:
    """Of each round that is over."""
    files = list((tmp_path / "runs").glob("*/rounds.jsonl"))
    return [json.loads(line)["seconds"] for line in files[0].read_text().splitlines()] if files else []


def begun(tmp_path: Path, nodes: Nodes, program: subprocess.Popen[str], *, more: int = 3) -> None:
    """Wait until some more rounds are over."""
    target = len(seconds(tmp_path)) + more
    until(lambda: len(seconds(tmp_path)) >= target or program.poll() is not None, seconds=600, what="rounds")
    assert program.poll() is None, f"ended too early: {nodes.said(program)}"


def longest_s(report: Report) -> float:
    return max(row["seconds"] for row in report.rounds)


@contextmanager
def held(hold: Path, nodes: Nodes, program: subprocess.Popen[str], node: int) -> Iterator[None]:
    """Slow the rounds from here on, until the program says once more that a node has joined."""
    hold.touch()
    joined = f"({nodes.ip(node)}) has joined"
    before = nodes.said(program).count(joined)
    try:
        yield
        until(
            lambda: nodes.said(program).count(joined) > before or program.poll() is not None, seconds=900, what=joined
        )
    finally:
        hold.unlink()
    assert program.poll() is None, f"ended too early: {nodes.said(program)}"


def test_a_node_is_killed_in_a_round_and_another_joins_later(
    tmp_path: Path, config: Path, inline: Report, hold: Path
) -> None:
    """The node that has joined is the one that the next run loses."""
    with cluster(3) as nodes:
        for lost, new in pairwise(range(2, 3 + KILLS)):
            folder = tmp_path / f"without{lost}"
            program = nodes.run(0, config, *OPTIONS, f'out="{folder / "runs"}"')
            begun(folder, nodes, program)
            nodes.kill(lost)
            begun(folder, nodes, program)
            stall_s = max(seconds(folder))
            with held(hold, nodes, program, new):
                nodes.start(new)
                nodes.started(new)
            said = nodes.ended(program)
            report = finished(folder / "runs")
            same(inline, report)
            assert f"({nodes.ip(lost)}) is lost" in said
            assert f"({nodes.ip(new)}) has joined" in said
            assert report.summary["failures"] == inline.summary["failures"]
            assert stall_s < STALL_S, f"run {lost - 1} of {KILLS}"
            print(f"run {lost - 1} of {KILLS}: longest round {stall_s:.1f} s")


@pytest.mark.parametrize("timeout_s", [5, 30])
def test_a_cut_link_stalls_no_longer_than_it_may(timeout_s: int, tmp_path: Path, config: Path, inline: Report) -> None:
    with cluster(2) as nodes:
        program = nodes.run(0, config, *OPTIONS, f"faults.node_timeout_s={timeout_s}")
        begun(tmp_path, nodes, program)
        nodes.cut(1)
        said = nodes.ended(program)
    report = finished(tmp_path / "runs")
    same(inline, report)
    assert f"({nodes.ip(1)}) is lost (no answer for " in said
    assert timeout_s - 1 < longest_s(report) < min(timeout_s + 10, STALL_S)


def test_a_node_whose_link_is_back_is_used_again_once_ray_starts_there(
    tmp_path: Path, config: Path, inline: Report, hold: Path
) -> None:
    with cluster(2) as nodes:
        program = nodes.run(0, config, *OPTIONS, "faults.node_timeout_s=5")
        begun(tmp_path, nodes, program)
        nodes.cut(1)
        begun(tmp_path, nodes, program)
        with held(hold, nodes, program, 1):
            nodes.mend(1)
            nodes.kill(1)
            nodes.join(1)
        said = nodes.ended(program)
    same(inline, finished(tmp_path / "runs"))
    assert f"({nodes.ip(1)}) is lost (no answer for " in said


def test_the_program_may_be_on_a_node_that_is_not_the_head(tmp_path: Path, config: Path, inline: Report) -> None:
    with cluster(3) as nodes:
        nodes.ended(nodes.run(1, config, *OPTIONS))
    same(inline, finished(tmp_path / "runs"))


def test_the_lost_head_is_one_line_and_the_run_goes_on_elsewhere(tmp_path: Path, config: Path, inline: Report) -> None:
    """The program is on the head: of that, all but the program is killed."""
    with cluster(2) as nodes:
        program = nodes.run(0, config, *OPTIONS, "faults.node_timeout_s=8")
        begun(tmp_path, nodes, program)
        nodes.kill(0)
        said = nodes.ended(program, status=1)
        lines = [line for line in said.splitlines() if "the run failed" in line]
        assert len(lines) == 1, said
        assert "lost" in lines[0]
        assert "--resume" in lines[0]
    with cluster(1) as nodes:
        nodes.ended(nodes.run(0, config, *OPTIONS, "faults.node_timeout_s=8", "--resume"))
    same(inline, finished(tmp_path / "runs"))


def test_a_slow_link_changes_nothing(tmp_path: Path, config: Path, inline: Report) -> None:
    with cluster(2) as nodes:
        nodes.slow(1, "20mbit")
        nodes.ended(nodes.run(0, config, *OPTIONS))
    same(inline, finished(tmp_path / "runs"))


CLIENT = """
from fl_sim.core.types import Update

def train(task, ctx):
    changed = {name: value * 0.9 if value.is_floating_point() else value for name, value in task.params.items()}
    return Update(changed, ctx.num_examples)
"""
TABLE = "\n".join(["a,b,label", *(f"{i % 7},{i % 5},{i % 2}" for i in range(400))])


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "client_of_a_node.py").write_text(CLIENT)
    (folder / "table.csv").write_text(TABLE)
    return folder


def test_a_node_without_the_code_or_the_data_is_named_and_code_can_be_shipped(
    tmp_path: Path, config: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ("client=client_of_a_node:train", "rounds=3")
    table = ("model.name=mlp", f'data.source="{mine / "table.csv"}"', "data.target=label")
    monkeypatch.syspath_prepend(mine)
    inline = run(Experiment.from_tree(TINY, [f'out="{tmp_path / "inline"}"', *client]))
    with cluster(2, {1: mine}) as nodes:
        for options, word in ((client, "client_of_a_node"), (table, "table.csv")):
            said = nodes.ended(nodes.run(0, config, *options, cwd=mine), status=2)
            (line,) = (line for line in said.splitlines() if line.startswith("fl-sim: "))
            assert f"({nodes.ip(1)})" in line
            assert word in line
            assert "ray.working_dir" in line
        shutil.rmtree(tmp_path / "runs")
        nodes.ended(nodes.run(0, config, *client, 'ray.working_dir="."', cwd=mine))
    same(inline, finished(tmp_path / "runs"))


def test_a_node_with_another_version_is_named(tmp_path: Path, config: Path) -> None:
    other = tmp_path / "other" / "torch-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
    with cluster(2, first={1: other.parent}) as nodes:
        said = nodes.ended(nodes.run(0, config), status=2)
    assert f"({nodes.ip(1)}) has other versions: torch 0.0.1 (here {version('torch')}); install the same there" in said


def test_a_late_node_without_the_code_is_named_and_not_used(tmp_path: Path, config: Path, mine: Path) -> None:
    with cluster(1, {1: mine}) as nodes:
        program = nodes.run(0, config, "client=client_of_a_node:train", "rounds=1000000", cwd=mine)
        begun(tmp_path, nodes, program)
        nodes.start(1)
        nodes.started(1)
        time.sleep(20)
        begun(tmp_path, nodes, program)
        program.send_signal(signal.SIGINT)
        program.wait(timeout=60)
        said = nodes.said(program)
    assert said.count(f"({nodes.ip(1)})") == 1, said
    assert "client_of_a_node" in said
    assert "The run goes on without it" in said
    assert "Traceback" not in said
