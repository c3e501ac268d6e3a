"""Every process builds its own data, model and code: a difference is told in one line before round 1."""

from __future__ import annotations

import importlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import worlds_apart
from federation import run_tiny, same, tiny
from flwr.app import Message
from flwr.serverapp import Grid
from interruption import KillAfter, Killed

from fl_sim import run
from fl_sim.core.types import UserError
from fl_sim.runtime.client.host import client_app
from fl_sim.runtime.grids.inline import InlineGrid
from fl_sim.runtime.worlds import HINTS, require_same
from fl_sim.simulation import RunStopped, resume
from fl_sim.simulation.client_side import hosts_of, make_client_app
from fl_sim.simulation.federation import Federation
from strategies.cohorts import Cohorts

SHORT = ("model.name=mlp", "training.steps=1")
WORKERS = ("engine=workers", "workers.count=1")
APART: Mapping[str, tuple[str, str]] = {
    "data.source=worlds_apart:noisy": ("data", "same files"),
    "data.source=worlds_apart:unseeded_split": ("split", "seed"),
    "data.source=worlds_apart:numbered_anyhow": ("labels", "sorted"),
    "data.partition=worlds_apart:unseeded_partition": ("partition", "seed"),
    "model.name=worlds_apart:weights_of_a_process": ("model", "seeded"),
    "model.name=worlds_apart:buffer_of_a_process": ("model", "seeded"),
    "model.name=worlds_apart:attribute_of_a_process": ("model", "seeded"),
}


@pytest.mark.parametrize("option", APART)
def test_a_worker_with_another_world_stops_the_run_before_round_1(tmp_path: Path, option: str) -> None:
    first, hint = APART[option]
    with pytest.raises(RunStopped, match=rf"a worker process has other {first}.* than the server.*{hint}"):
        run_tiny(tmp_path, *SHORT, option, *WORKERS)
    (folder,) = tmp_path.iterdir()
    assert (folder / "rounds.jsonl").read_text() == ""


@pytest.mark.parametrize("option", APART)
def test_a_resumed_run_with_another_world_is_refused(
    tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run's identity does not tell is told by its checkpoint: partition and model."""
    first, hint = APART[option]
    asked = tiny(tmp_path, *SHORT, option)
    with pytest.raises(Killed):
        run(asked, KillAfter(1, 1))
    monkeypatch.setattr(worlds_apart, "SALT", worlds_apart.SALT + 1)
    told = {
        "partition": rf"this process has other partition than the stopped run.*{hint}",
        "model": rf"this process has other model than the stopped run.*{hint}",
    }
    with pytest.raises(UserError, match=told.get(first, "the data .* changed")):
        resume(asked)


UNREPEATABLE: Mapping[str, str] = {
    "unseeded_weights": "1.weight",
    "unseeded_buffer": "projection",
    "unseeded_attribute": "tensors, arrays or generators that it keeps as attributes",
    "unseeded_generator": "tensors, arrays or generators that it keeps as attributes",
}


@pytest.mark.parametrize("name", UNREPEATABLE)
def test_a_model_that_comes_out_otherwise_the_second_time_is_refused_before_round_1(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.*built twice from one seed, .* other values in {UNREPEATABLE[name]}"):
        run_tiny(tmp_path, *SHORT, f"model.name=worlds_apart:{name}")


@pytest.mark.parametrize(
    "option",
    [
        "data.source=worlds_apart:by_global_generators",
        "model.name=worlds_apart:weights_by_numpy",
        "model.name=worlds_apart:buffer_by_numpy",
        "model.name=worlds_apart:attribute_by_numpy",
    ],
)
def test_what_global_generators_give_is_the_same_everywhere(tmp_path: Path, option: str) -> None:
    options = (*SHORT, option, "wire.downlink.content=difference")
    same(run_tiny(tmp_path / "a", *options), run_tiny(tmp_path / "b", *options, *WORKERS))


CLIENT = """
from fl_sim import Task, Update
from helper_of_mine import scale

def train(task, ctx):
    return Update(task.params, ctx.num_examples, None, {{"loss": scale * {number}}})
"""


def test_other_code_of_the_client_or_of_its_helper_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    client, helper = tmp_path / "client_of_mine.py", tmp_path / "helper_of_mine.py"
    client.write_text(CLIENT.format(number=1))
    helper.write_text("scale = 1.0\n")
    importlib.invalidate_caches()
    try:
        asked = tiny(tmp_path / "out", *SHORT, "client=client_of_mine:train")
        servers = Federation.build(asked).world
        make_client_app(asked, servers)
        helper.write_text("scale = 2.0\n")
        with pytest.raises(UserError, match=rf"a worker process has other code \(client: {helper}\) than the server"):
            make_client_app(asked, servers)
    finally:
        for name in ("client_of_mine", "helper_of_mine"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("expected", "files"),
    [
        ('{"client": {"a.py": "0", "b/__init__.py": "1"}}', "client: a.py"),
        ('{"client": {"a.py": "1"}, "model.name": {"m.py": "2"}}', "client: b/__init__.py, model.name: m.py"),
        ("{}", "client: a.py, client: b/__init__.py"),
    ],
)
def test_files_that_differ_are_named_by_the_key_of_their_part(expected: str, files: str) -> None:
    found = {"code": '{"client": {"a.py": "1", "b/__init__.py": "1"}}'}
    with pytest.raises(UserError, match=re.escape(f"this process has other code ({files}) than the server")):
        require_same({"code": expected}, found, "this process")


@pytest.mark.parametrize("code", ["no json", "[1]", '{"client": 3}', "[" * 100_000])
def test_a_changed_hash_of_code_is_a_difference_like_another(code: str) -> None:
    with pytest.raises(UserError, match="this process has other code than the server"):
        require_same({"code": code}, {"code": "[]"}, "this process")


class Foreign(Grid):
    """A Grid that does not know which partition a node holds, as Flower's."""

    def __init__(self, inner: InlineGrid) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        if name == "partitions":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def set_run(self, run: object) -> None:
        self.inner.set_run(run)

    run = property(lambda self: self.inner.run)

    def create_message(self, *args: object, **options: object) -> Message:
        return self.inner.create_message(*args, **options)

    def get_node_ids(self) -> Iterator[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: object) -> object:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: object) -> object:
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages: object, *, timeout: float | None = None) -> object:
        return self.inner.send_and_receive(messages, timeout=timeout)


def test_foreign_nodes_are_compared_when_they_are_asked_for_their_partition(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, *SHORT))
    grid = Foreign(InlineGrid(client_app(hosts_of(federation)), len(federation.partitions)))
    assert list(Cohorts(0, world=federation.world).nodes(grid)) == list(range(6))
    other = {**federation.world, "labels": "0123456789abcdef"}
    with pytest.raises(UserError, match=r"node 1000 has other labels than the server"):
        Cohorts(0, world=other).nodes(grid)


def test_what_either_side_does_not_say_is_passed_over() -> None:
    require_same({"data": "1"}, {"code": "2"}, "somebody")
    with pytest.raises(UserError, match="somebody has other data, code than"):
        require_same({"data": "1", "code": "1"}, {"data": "2", "code": "2"}, "somebody")


def test_the_same_config_gives_the_same_hashes_and_other_seeds_others(tmp_path: Path) -> None:
    one, again = (Federation.build(tiny(tmp_path, *SHORT)).world for _ in range(2))
    other = Federation.build(tiny(tmp_path, *SHORT, "seed=1")).world
    assert one == again
    assert list(one) == list(HINTS)
    assert {name for name in one if one[name] != other[name]} == {"partition", "model"}


def test_a_fingerprint_of_cifar_takes_well_under_a_second() -> None:
    from fl_sim.bench.workloads import B0

    federation = replace(Federation.build(B0.on("inline")))
    start = time.perf_counter()
    assert len(federation.world) == len(HINTS)
    assert time.perf_counter() - start < 1.0
