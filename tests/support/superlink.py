"""Flower's own runtimes on loopback, for the slow tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path) -> dict[str, str]:
    """Quiet, offline, and at home in a folder of its own."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def superlink(home: Path, *, nodes: int) -> Iterator[dict[str, str]]:
    """A SuperLink with SuperNodes; yields the environment in which `flwr ... lo` reaches it."""
    env, port = environment(home), free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "lo"\n[superlink.lo]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    log = (home / "log.txt").open("w")

    def start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([str(BIN / command[0]), *command[1:]], env=env, stdout=log, stderr=log)

    link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    processes = [start(*link, "--disable-runtime-dependency-installation")]
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        for i in range(nodes):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            processes.append(start(*node, "--node-config", f"partition-id={i} num-partitions={nodes}"))
        time.sleep(8)
        yield env
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        log.close()


def wait_for(url: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urlopen(url, timeout=2):
                return
        except (URLError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def flwr_run(env: dict[str, str], *arguments: str, run_config: dict[str, str], timeout: float = 400) -> str:
    """`flwr run examples/flower`, streamed until the run ends; returns the log."""
    settings = " ".join(f'{key}="{value}"' for key, value in run_config.items())
    command = [str(BIN / "flwr"), "run", "examples/flower", *arguments, "--stream", "--run-config", settings]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    return done.stdout + done.stderr


def runs(env: dict[str, str], *arguments: str) -> list[dict[str, object]]:
    """`flwr ls`: status and traffic of the runs."""
    command = [str(BIN / "flwr"), "ls", *arguments, "--format", "json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    return list(json.loads(done.stdout)["runs"])
