"""Ray started in a thread of its own while the program imports: most of a start of Ray is waiting for its processes.

Only what Ray itself needs is imported here, so that a program may begin before its own imports.
"""

from __future__ import annotations

import logging
import os
import threading
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's own setting: seconds without its head after which it ends the process."""
NODE_TIMEOUT_S = 30
"""The default of `faults.node_timeout_s`, which Ray is told as `PATIENCE`."""
SILENTLY = {"log_to_driver": False, "logging_level": logging.ERROR}
MOST_BYTES = 1_000_000
_begun: threading.Event | None = None


def settle_environment() -> None:
    """Settings of Ray that it reads when it is imported, and gives to the processes that it starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would let its workers wait (niceness 15) for its own agents, of which five start at the same time, and for every
    # other program of the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")


def begin(config: Path, overrides: Sequence[str]) -> None:
    """Start Ray on this machine for a config, unless the config says more of Ray than how many workers there are.

    What is wrong with a config is for others to say: then nothing is started.
    """
    global _begun
    if _begun is None and (found := _workers(config, overrides)) is not None:
        _begun = threading.Event()
        # Ray's processes end with the thread that started them, so this one stays; it ends with the program.
        threading.Thread(target=_start, args=(*found, _begun), name="fl_sim-ray", daemon=True).start()
        # Python ends this program after threads that are no daemons: one that ended while Ray starts would crash.
        threading.Thread(target=_begun.wait, name="fl_sim-ray-started").start()


def ended() -> bool:
    """Wait until Ray has started or failed to, if that was begun; whether it runs now because of that."""
    global _begun
    done, _begun = _begun, None
    if done is None:
        return False
    done.wait()
    import ray

    return bool(ray.is_initialized())


def _workers(config: Path, overrides: Sequence[str]) -> tuple[int | None] | None:
    """How many workers a config asks for (None = it does not say), where that is all that it says of Ray; else None."""
    if any(text.split("=")[0].split(".")[0].strip() in ("ray", "faults") for text in overrides):
        return None
    try:
        if config.stat().st_size > MOST_BYTES:
            return None
        tree = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    asked = tree.get("ray", {})
    count = asked.get("workers") if isinstance(asked, dict) and asked.keys() <= {"workers"} else 0
    fits = count is None or (type(count) is int and 1 <= count <= 4096)
    return (count,) if fits and "node_timeout_s" not in str(tree.get("faults")) else None


def _start(workers: int | None, done: threading.Event) -> None:
    settle_environment()
    os.environ.setdefault(PATIENCE, str(NODE_TIMEOUT_S))
    try:
        import ray

        init = cast("Callable[..., object]", ray.init)
        with suppress(OSError, ValueError, TypeError, RuntimeError):  # it is tried again, and then said
            init(address="local", num_cpus=workers, include_dashboard=False, **SILENTLY)
    finally:
        done.set()
    threading.Event().wait()
