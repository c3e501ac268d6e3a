"""Large cohorts on a cluster whose nodes are network namespaces: workers of three machines add up updates, one machine is lost
with what it has added up, and the bits are those of `inline`.

Where network namespaces are not allowed the tests say so and are skipped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import tomli_w
from federation import TINY, same
from noted_client import NOTES, noted, places
from ray_nodes import cluster, finished, until, why_not

from fl_sim import Experiment, Report, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
COHORT = 256
ROUNDS = 3
OPTIONS = (
    "client.target=noted_client:fedavg",
    "client.seconds=0.02",
    "data.partition=iid",
    "data.clients=300",
    f"cohort.size={COHORT}",
    "model.name=mlp",
    f"rounds={ROUNDS}",
)


@pytest.fixture(autouse=True)
def notes(tmp_path: Path) -> Iterator[Path]:
    """Where clients note that they have begun."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    (folder := tmp_path / "notes").mkdir()
    with mock.patch.dict(os.environ, {NOTES: str(folder)}):
        yield folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "folded.toml"
    path.write_text(tomli_w.dumps({**TINY, "out": str(tmp_path / "runs")}))
    return path


def inline(tmp_path: Path) -> Report:
    (folder := tmp_path / "notes-inline").mkdir()
    with mock.patch.dict(os.environ, {NOTES: str(folder)}):
        return run(Experiment.from_tree(TINY, [f'out="{tmp_path / "inline"}"', *OPTIONS]))


def over(tmp_path: Path) -> int:
    """Rounds that are over."""
    files = list((tmp_path / "runs").glob("*/rounds.jsonl"))
    return len([json.loads(line) for line in files[0].read_text().splitlines()]) if files else 0


def test_workers_of_three_nodes_add_up_the_bits_of_inline(tmp_path: Path, config: Path, notes: Path) -> None:
    with cluster(3) as nodes:
        said = nodes.ended(nodes.run(0, config, *OPTIONS))
    assert len(list(noted(notes, 1))) == 3
    same(expected := inline(tmp_path), finished(tmp_path / "runs"))
    (told,) = re.findall(r"256 of 256 updates were added up where they were made: ([\d.]+) MB of sums", said)
    assert float(told) == pytest.approx(3 * 8 * int(str(expected.summary["params"])) / 1e6, rel=0.05), (
        "one of each node"
    )


def test_a_node_that_is_lost_with_its_sum_costs_nothing_but_time(tmp_path: Path, config: Path, notes: Path) -> None:
    with cluster(3) as nodes:
        program = nodes.run(0, config, *OPTIONS)
        until(lambda: bool(at_work(notes, nodes.pids(2))), seconds=300, what="clients of a second round")
        killed = set(nodes.pids(2))
        nodes.kill(2)
        assert over(tmp_path) == 1, "in the middle of the second round"
        said = nodes.ended(program)
    assert f"({nodes.ip(2)}) is lost" in said
    (began,) = (clients for process, clients in noted(notes, 2) if process in killed)
    where = places(notes, 2)
    assert len(where) == COHORT
    again = [client for client, ran in where.items() if len(ran) > 1]
    assert sorted(again) == sorted(began), "they ran again elsewhere, and nobody else"
    report = finished(tmp_path / "runs")
    same(inline(tmp_path), report)
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}


def at_work(notes: Path, processes: list[int]) -> list[int]:
    """Clients of the second round that one of these processes has begun, once there are twenty, some of which have answered."""
    found = [clients for process, clients in noted(notes, 2) if process in processes]
    return found[0] if found and len(found[0]) >= 20 else []
