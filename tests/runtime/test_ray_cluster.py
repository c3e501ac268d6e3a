"""A Ray cluster that somebody else started, with a GPU in its books: `ray.address` and shares of `ray.num_gpus`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import run_tiny, tiny

from fl_sim import run
from fl_sim.core.types import UserError


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The head of a cluster of two CPUs and, so it says, one GPU."""
    script, port = Path(sys.executable).with_name("ray"), _free_port()
    options = ("--head", f"--port={port}", "--num-cpus=2", "--num-gpus=1", "--include-dashboard=false", "--block")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path: Ray's sockets lie in it
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
        head = subprocess.Popen([script, "start", *options], env=environment, stdout=subprocess.DEVNULL)
        _wait_for(port, seconds=60)
        yield f"127.0.0.1:{port}"
        head.terminate()  # not `ray stop`, which would stop every Ray on this machine
        head.wait(timeout=60)


def _wait_for(port: int, *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nobody listens at port {port}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_run_joins_a_cluster_by_its_address(tmp_path: Path, address: str) -> None:
    inline = run_tiny(tmp_path / "inline")
    joined = run_tiny(tmp_path / "joined", "engine=ray", f'ray.address="{address}"', "ray.workers=2")
    shared = run_tiny(tmp_path / "shared", "engine=ray", f'ray.address="{address}"', "ray.num_gpus=0.5")
    assert joined.summary["params_sha256"] == shared.summary["params_sha256"] == inline.summary["params_sha256"]
    assert joined.ledger.to_table().equals(inline.ledger.to_table())


@pytest.mark.slow
def test_more_gpus_than_the_cluster_has(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"ray\.num_gpus = 2\.0: the cluster has 1\.0 GPUs"):
        run_tiny(tmp_path, "engine=ray", f'ray.address="{address}"', "ray.num_gpus=2")


def test_nobody_at_the_address_is_one_line_at_once_and_earlier_results_stay(tmp_path: Path) -> None:
    kept = run_tiny(tmp_path)
    asked = tiny(tmp_path, "engine=ray", f'ray.address="127.0.0.1:{_free_port()}"')
    with pytest.raises(UserError, match=r"ray\.address '127\.0\.0\.1:\d+': .*refused"):
        run(asked, fresh=True)
    assert (kept.folder / "summary.json").exists()
