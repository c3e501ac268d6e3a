"""One start of Ray for a module of slow tests: `start` before the first use, `end` after the last."""

from __future__ import annotations

import logging
import sys


def start(engine: str) -> None:
    """Start Ray where the engine needs it and it does not run."""
    if engine != "ray":
        return
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def end() -> None:
    """Stop Ray, if it runs."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
