"""A Ray cluster on one machine whose nodes are network namespaces, so that a node, a link or the head can really be lost.

Each node has an address of its own behind a virtual Ethernet link to a switch, a namespace without processes; node 0 is the head.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from fl_sim import Report
from fl_sim.simulation.run_folder import saved_params

PORT = 6379


def why_not() -> str | None:
    """Why this machine cannot make network namespaces; None where it can."""
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip` (iproute2)"
    name = f"fl{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    tried = _ip("-n", name, "link", "add", "v0", "type", "bridge")
    _ip("netns", "del", name)
    return f"network namespaces cannot hold a bridge here: {tried.stderr.strip()}" if tried.returncode else None


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def _must(*words: str) -> None:
    done = _ip(*words)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass
class Nodes:
    """The nodes of a cluster: `start` and `kill` them, `cut` and `mend` their links, run a program on one of them.

    `hidden`: node -> a folder that is empty there; `first`: node -> a folder where Python looks first there.
    """

    prefix: str
    folder: Path
    hidden: dict[int, Path] = field(default_factory=dict)
    first: dict[int, Path] = field(default_factory=dict)
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    programs: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.ip(0)}:{PORT}"

    @staticmethod
    def ip(node: int) -> str:
        return f"10.77.0.{node + 1}"

    @property
    def switch(self) -> str:
        return f"{self.prefix}switch"

    def name(self, node: int) -> str:
        return f"{self.prefix}n{node}"

    def start(self, node: int) -> None:
        """Make a node and start Ray on it; the head is node 0 and comes first."""
        name, switch = self.name(node), self.switch
        if node == 0:
            _must("netns", "add", switch)
            _must("-n", switch, "link", "add", "br0", "type", "bridge")
            _must("-n", switch, "link", "set", "br0", "up")
        _must("netns", "add", name)
        _must("-n", name, "link", "set", "lo", "up")
        _must("-n", switch, "link", "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _must("-n", switch, "link", "set", f"v{node}", "master", "br0", "up")
        _must("-n", name, "addr", "add", f"{self.ip(node)}/24", "dev", "eth0")
        _must("-n", name, "link", "set", "eth0", "up")
        # Ray asks for the way to a public address to find out its own; no packet is sent there.
        _must("-n", name, "route", "add", "default", "dev", "eth0")
        self.join(node)

    def join(self, node: int) -> None:
        """Start Ray on a node that exists."""
        role = ["--head", "--port", str(PORT), "--include-dashboard", "false"]
        if node:
            role = ["--address", self.address]
        processors = ["--num-cpus", "1"]
        ray = Path(sys.executable).with_name("ray")
        command = [str(ray), "start", *role, "--node-ip-address", self.ip(node), *processors, "--block"]
        empty = ([self.folder] if node else []) + ([self.hidden[node]] if node in self.hidden else [])
        for folder in empty:  # in the node's own table of mounts: two machines do not share Ray's files
            command = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder), *command]
        # These machines share processors with whatever else runs on this one, so that workers are no nicer than programs.
        own = self.environment(*([self.first[node]] if node in self.first else [])) | {"RAY_worker_niceness": "0"}
        self.processes[node] = subprocess.Popen(
            ["ip", "netns", "exec", self.name(node), *command],
            env=os.environ | own,
            stdout=(self.folder / f"node{node}.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def environment(self, *first: Path) -> Mapping[str, str]:
        """Variables of what runs on the nodes, which can import what the tests can, and finds what is in `first` before that."""
        paths = [*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parent)]
        return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(self.folder), "PYTHONPATH": ":".join(paths)}

    def kill(self, node: int) -> None:
        """Kill Ray on a node, all of it at once; programs of this cluster go on."""
        spared = {program.pid for program in self.programs}
        for pid in self.pids(node):
            with suppress(ProcessLookupError):
                if not spared & set(_ancestry(pid)):
                    os.kill(pid, signal.SIGKILL)
        self.processes.pop(node).wait()

    def pids(self, node: int) -> list[int]:
        """The processes on a node."""
        return [int(word) for word in _ip("netns", "pids", self.name(node)).stdout.split()]

    def cut(self, node: int) -> None:
        """Take the link of a node down: nothing is refused, nothing is answered."""
        _must("-n", self.switch, "link", "set", f"v{node}", "down")

    def mend(self, node: int) -> None:
        _must("-n", self.switch, "link", "set", f"v{node}", "up")

    def slow(self, node: int, rate: str) -> None:
        """Let no more through the link of a node than `rate`, such as `20mbit`, each way."""
        for name, device in ((self.switch, f"v{node}"), (self.name(node), "eth0")):
            shape = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
            subprocess.run(["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", device, *shape], check=True)

    def moved(self, node: int) -> tuple[int, int]:
        """Bytes that came to a node over its link, and that left it, so far, headers of packets included."""
        counters = ["cat", f"/sys/class/net/v{node}/statistics/tx_bytes", f"/sys/class/net/v{node}/statistics/rx_bytes"]
        read = subprocess.run(["ip", "netns", "exec", self.switch, *counters], check=True, capture_output=True)
        to, out = map(int, read.stdout.split())
        return to, out

    def run(self, node: int, config: Path, *options: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start `fl-sim run` on a node, on this cluster."""
        ray = ("engine=ray", f'ray.address="{self.address}"')
        return self.program(node, sys.executable, "-m", "fl_sim.cli", "run", str(config), *ray, *options, cwd=cwd)

    def program(self, node: int, *command: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start a program on a node where Ray runs; what it writes is in `said`."""
        log = self.folder / f"program{len(self.programs)}.log"
        place = ["--target", str(self.processes[node].pid), "--mount", "--net", f"--wd={cwd or Path.cwd()}"]
        program = subprocess.Popen(
            ["nsenter", *place, "--", *command],
            env=os.environ | self.environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.programs.append(program)
        return program

    def said(self, program: subprocess.Popen[str]) -> str:
        """What a program has written so far, to its standard output and error."""
        return (self.folder / f"program{self.programs.index(program)}.log").read_text(errors="replace")

    def ended(self, program: subprocess.Popen[str], *, status: int = 0, seconds: float = 900) -> str:
        """Wait for a program to end with a status; returns what it has written.

        Raises:
            AssertionError: it ended with another one, or with a traceback.
        """
        try:
            program.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            program.kill()
            raise
        said = self.said(program)
        assert program.returncode == status, f"status {program.returncode}: {said}"
        assert "Traceback" not in said
        return said

    def started(self, node: int, *, seconds: float = 300) -> None:
        """Wait until Ray runs on a node."""
        log = self.folder / f"node{node}.log"
        until(lambda: b"Ray runtime started" in log.read_bytes(), seconds=seconds, what=f"Ray on node {node}")

    def close(self) -> None:
        for program in self.programs:
            if program.poll() is None:
                program.kill()
            program.wait()
        for node in list(self.processes):
            self.kill(node)
        listed = _ip("netns", "list").stdout.split()
        for name in (word for word in listed if word.startswith(self.prefix)):
            _ip("netns", "del", name)


def _ancestry(pid: int) -> Iterator[int]:
    """A process, the one that started it, and so on; empty once it has ended."""
    while pid > 1:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            return


def finished(runs: Path) -> Report:
    """The one run in a folder."""
    (folder,) = runs.iterdir()
    return read(folder)


def read(folder: Path) -> Report:
    """A finished run as its folder has it, with the parameters of its file: adapters are in the weights there."""
    return replace(Report.load(folder), params=saved_params(folder))


def until(there: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Wait for something, not longer than that.

    Raises:
        TimeoutError: it did not come.
    """
    stop = time.monotonic() + seconds
    while not there():
        if time.monotonic() > stop:
            raise TimeoutError(f"no {what} within {seconds} s")
        time.sleep(0.2)


@contextmanager
def cluster(
    nodes: int, hidden: Mapping[int, Path] | None = None, first: Mapping[int, Path] | None = None
) -> Iterator[Nodes]:
    """A cluster of that many nodes of one CPU each; all is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path: Ray's sockets lie in it
        made = Nodes(f"fl{os.getpid()}", Path(folder), dict(hidden or {}), dict(first or {}))
        try:
            for node in range(nodes):  # one after the other: they share a folder
                made.start(node)
                made.started(node)
            yield made
        finally:
            made.close()
