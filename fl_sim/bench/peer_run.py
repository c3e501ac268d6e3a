"""A peer: another federated library, which runs a workload's folder in a Python of its own and is told what it did by lines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_sim.bench.peer_folder import Settings
from fl_sim.core.types import UserError

SCRIPTS = Path(__file__).with_name("peers")
LIMIT_S = 900
"""A peer that takes longer has failed."""
MARK = "ROUND "
FAULT = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception)\b.*)")
VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({name: found(name) for name in sys.argv[1:]}))
"""


def _alone(python: str, script: str, processes: int) -> list[str]:
    return [python, script]


def _distributed(python: str, script: str, processes: int) -> list[str]:
    return [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]


@dataclass(frozen=True)
class Peer:
    """Another library.

    Attributes:
        packages: distributions whose versions are told, itself first.
        install: what `pip install` is given, the version that the script is written for.
        works: names of the workloads that it can run.
        note: how it is used, and what it does not do.
        command: (python, script, processes) -> what is started, the folder behind it.
    """

    packages: tuple[str, ...]
    install: str
    works: tuple[str, ...]
    note: str
    command: Callable[[str, str, int], list[str]] = _alone


PEERS: Mapping[str, Peer] = {
    "pfl": Peer(
        ("pfl", "torch"),
        "'pfl[pytorch]==0.6.0'",
        ("b0", "small", "mlp"),
        "torchrun and gloo, FederatedAveraging, fused SGD; sums differences in place: encodes no update and books no byte",
        _distributed,
    ),
    "flower": Peer(
        ("flwr", "ray", "torch"),
        "'flwr[simulation]==1.41.0' torch",
        ("b0", "small", "mlp"),
        "its Ray simulation and FedAvg, model and data resident, fused SGD; packs arrays by np.save and books no byte",
    ),
    "fedjax": Peer(
        ("fedjax", "jax"),
        "fedjax==0.0.17 jax==0.4.35 jaxlib==0.4.35 dm-haiku==0.0.13 optax==0.2.3",
        ("mlp",),
        "fed_avg by its backend jit in one process, whose threads are XLA's; encodes no update and books no byte",
    ),
}


@dataclass(frozen=True)
class Installed:
    """A peer, the Python that has it, and versions by package."""

    name: str
    peer: Peer
    python: str
    versions: Mapping[str, str]


def asked(text: str) -> dict[str, str]:
    """Read `pfl=/path/to/python,flower`: name -> Python; without a path the one that runs this.

    Raises:
        UserError: no such peer, or one twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        name, given, path = part.partition("=")
        if name not in PEERS:
            raise UserError(f"--with {part!r}: allowed: {', '.join(PEERS)}, each with =PYTHON or without")
        if name in found:
            raise UserError(f"--with {text!r}: {name} is there twice")
        if given and not path:
            raise UserError(f"--with {part!r}: a path to a Python is missing")
        found[name] = path or sys.executable
    return found


def installed(name: str, python: str) -> Installed:
    """Look for a peer in a Python.

    Raises:
        UserError: it is not there, with how to install it.
    """
    peer = PEERS[name]
    try:
        done = subprocess.run([python, "-c", VERSIONS, *peer.packages], capture_output=True, text=True, check=True)
        versions: dict[str, str | None] = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise UserError(f"--with {name}={python}: is no Python that runs: {error}") from error
    if missing := [package for package, version in versions.items() if version is None]:
        raise UserError(
            f"--with {name}: {python} has no {missing[0]}; in an environment of its own: python3 -m venv PLACE && "
            f"PLACE/bin/pip install {peer.install}, then --with {name}=PLACE/bin/python"
        )
    return Installed(name, peer, python, {package: str(version) for package, version in versions.items()})


def run(one: Installed, place: Path, settings: Settings) -> tuple[float, ...]:
    """Run a workload's folder; seconds of each timed round.

    Raises:
        RuntimeError: the peer failed, took too long, or did something else than it was asked.
    """
    script = str(SCRIPTS / f"with_{one.name}.py")
    command = [*one.peer.command(one.python, script, settings.processes), str(place)]
    return seconds_of(one.name, _output(one.name, command).splitlines(), settings)


def seconds_of(name: str, lines: Sequence[str], settings: Settings) -> tuple[float, ...]:
    """Seconds of each timed round, from the lines that a script printed.

    Raises:
        RuntimeError: a line that cannot be read, too few of them, or a round with other than the asked client fits.
    """
    found = [_round(name, line) for line in lines if line.startswith(MARK)]
    if len(found) != settings.warmup + settings.rounds:
        raise RuntimeError(f"{name}: told of {len(found)} rounds instead of {settings.warmup + settings.rounds}")
    for number, (fits, _) in enumerate(found, 1):
        if fits != settings.cohort:
            raise RuntimeError(f"{name}: round {number} had {fits} client fits instead of {settings.cohort}")
    return tuple(seconds for _, seconds in found[settings.warmup :])


def _round(name: str, line: str) -> tuple[int, float]:
    try:
        told = json.loads(line.removeprefix(MARK))
        fits, seconds = int(told["fits"]), float(told["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{name}: cannot read its line {line!r}") from error
    if not seconds > 0:
        raise RuntimeError(f"{name}: a round of {seconds} s in its line {line!r}")
    return fits, seconds


def _output(name: str, command: Sequence[str]) -> str:
    """What a program prints, which is ended with all that it started in its session if it takes too long."""
    own = {
        **os.environ,
        "PYTHONPATH": str(SCRIPTS),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=own, start_new_session=True) as process:
        try:
            told, faults = process.communicate(timeout=LIMIT_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGTERM)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{name}: not done after {LIMIT_S} s") from error
            raise
    if process.returncode:
        raise RuntimeError(f"{name}: ended with status {process.returncode}: {_fault(faults)}")
    return told


def _fault(text: str) -> str:
    """The line of a traceback that says what went wrong: the first, as others report that one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = (match.group(1) for line in lines if (match := FAULT.match(line)))
    return next(named, lines[-1] if lines else "no word")
