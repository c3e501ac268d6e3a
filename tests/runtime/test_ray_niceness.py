"""Clients on Ray get the processor as the program does: Ray's own default makes its workers wait for every other program."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os
from fl_sim.runtime.grids.ray import RayOptions, connected

os.nice(5)
with connected(RayOptions(workers=1)) as ray:
    print(os.nice(0), ray.get(ray.remote(lambda: os.nice(0)).remote()))
"""


@pytest.mark.slow
def test_workers_of_a_ray_that_is_started_here_have_the_niceness_of_the_program() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    own, workers = done.stdout.split()
    assert own == workers
