"""What a node must have in common with the program: each difference is one line with the node and the remedy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from fl_sim.core.types import UserError
from fl_sim.runtime.grids import ray as ray_engine
from fl_sim.runtime.grids.ray import RayOptions
from fl_sim.runtime.grids.ray_actors import Actors, Starting
from fl_sim.runtime.grids.ray_worker import PACKAGES, Here, actor_class, why_not_built
from fl_sim.simulation.client_side import make_client_app

OWN: Mapping[str, str] = actor_class().versions(PACKAGES)  # type: ignore[attr-defined]
NODE = "worker-2 (10.0.0.2)"


def test_the_same_versions_are_no_difference() -> None:
    assert {"Python", "torch", "numpy", "flwr"} <= OWN.keys()
    assert Here("1", NODE, "10.0.0.2", OWN).differences() == ""


@pytest.mark.parametrize("package", ["Python", "torch", "flwr"])
def test_other_and_missing_versions_are_listed_beside_the_own(package: str) -> None:
    other = Here("1", NODE, "10.0.0.2", {**OWN, package: "0.1"})
    missing = Here("1", NODE, "10.0.0.2", {name: found for name, found in OWN.items() if name != package})
    assert other.differences() == f"{package} 0.1 (here {OWN[package]})"
    assert missing.differences() == f"{package} is missing (here {OWN[package]})"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ModuleNotFoundError("No module named 'fl_sim'"),
            "ModuleNotFoundError: No module named 'fl_sim'; a node needs",
        ),
        (
            UserError("data.source = '/d/table.csv': no such file"),
            ": data.source = '/d/table.csv': no such file; a node",
        ),
        (None, "its worker ended while it started: the actor died and more"),
    ],
)
def test_a_node_that_cannot_build_is_named_in_one_line(error: BaseException | None, words: str) -> None:
    raised = RuntimeError("the actor died\nand more")
    raised.cause = error  # type: ignore[attr-defined]
    line = why_not_built(raised, NODE)
    assert line.startswith(f"node {NODE}: ")
    assert words in line
    assert "\n" not in line


def test_other_code_of_fl_sim_under_the_same_version_is_told() -> None:
    with pytest.raises(UserError, match=r"fl_sim there has other code \(\w+\) than here \(12345678\)"):
        make_client_app(SimpleNamespace(), version="12345678")  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"workdir": "."}, {"_inject_current_ray": True}])
def test_fields_of_a_runtime_environment_that_ray_would_ignore_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"ray\.runtime_env: unknown {next(iter(fields))}; Ray has .*working_dir"):
        ray_engine._environment(fields)


def test_one_working_folder_is_given() -> None:
    with pytest.raises(UserError, match="give one of them"):
        RayOptions(working_dir=".", runtime_env={"working_dir": "."})
    assert RayOptions(working_dir="a", runtime_env={"env_vars": {"A": "1"}}).environment == {
        "env_vars": {"A": "1"},
        "working_dir": "a",
    }
    assert RayOptions().environment == {}


@pytest.mark.parametrize(("whole", "waited", "fails"), [(1, 59, False), (1, 100, False), (1, 301, True), (0, 61, True)])
def test_a_busy_cluster_is_waited_for_longer_than_one_that_is_too_small(
    whole: int, waited: float, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ray = ModuleType("ray")
    vars(ray).update(
        remote=lambda made: SimpleNamespace(options=lambda **needs: made),
        available_resources=dict,
        cluster_resources=lambda: {"CPU": whole},
    )
    actors = Actors(ray, lambda but: 1, cast("Any", None), {"num_cpus": 1.0, "num_gpus": 0.0}, 30.0)
    actors.starting[1] = Starting(cast("Any", None), cast("Any", None), cast("Any", None))
    actors._last_alive = time.monotonic() - waited
    if fails:
        with pytest.raises(UserError, match=r"no room for a worker \(1 CPU and 0 GPU\); free are 0 CPUs, 0 GPUs"):
            actors.require_some(UserError)
        return
    for _ in range(2):
        actors.require_some(UserError)
    assert [record.message.count("waiting up to 300 s") for record in caplog.records] == [1] * (waited > 60)
