"""Ray that is started while the program imports: for which configs, and that it lives as long as the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fl_sim.runtime.grids.ray_ahead import _workers


@pytest.mark.parametrize(
    ("text", "overrides", "found"),
    [
        ('name = "x"', [], (None,)),
        ("[ray]\nworkers = 3", ["rounds=2"], (3,)),
        ("[ray]\nworkers = 3", ["ray.workers=2"], None),
        ('[ray]\naddress = "auto"', [], None),
        ("[ray]\nworkers = 0", [], None),
        ("[ray]\nworkers = true", [], None),
        ("ray = 3", [], None),
        ("[faults]\nnode_timeout_s = 5", [], None),
        ("no = = toml", [], None),
    ],
)
def test_it_is_started_where_the_config_says_nothing_else_of_ray(
    tmp_path: Path, text: str, overrides: list[str], found: tuple[int | None] | None
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    assert _workers(config, overrides) == found


RUN = """
import sys, time
from pathlib import Path
from fl_sim.runtime.grids import ray_ahead
ray_ahead.begin(Path(sys.argv[1]), [])
assert "torch" not in sys.modules  # or there would be nothing left to do meanwhile
from fl_sim.runtime.grids.ray import RayOptions, connected
with connected(RayOptions()) as ray:
    time.sleep(0.5)  # processes of a thread that has ended are killed at once
    assert int(ray.cluster_resources()["CPU"]) == 1, ray.cluster_resources()
assert not ray.is_initialized()
"""


def test_it_lives_as_long_as_the_run(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[ray]\nworkers = 1")
    done = subprocess.run([sys.executable, "-c", RUN, str(config)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_program_that_ends_before_ray_has_started_ends_as_it_would(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("cliennts = 1")
    command = [sys.executable, "-m", "fl_sim.cli.app", "run", str(config), "--engine", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
