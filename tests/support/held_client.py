"""A client that is slow while a file exists, so that a run lasts until a cluster is as a test wants it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from clients import presets
from fl_sim.core.types import Task, Update
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training

HOLD = "FL_SIM_TEST_HOLD"
"""Environment variable: path of the file."""
FAST_S, SLOW_S = 0.05, 2.0
"""Seconds that a client waits: enough to act between two rounds; enough for a machine to join within a few of them."""


def topk(*, training: Training, density: float = 0.1) -> Client:
    """As `clients.presets:topk`."""
    inner = presets.topk(training=training, density=density)

    def client(task: Task, ctx: ClientContext) -> Update:
        time.sleep(SLOW_S if Path(os.environ[HOLD]).exists() else FAST_S)
        return inner(task, ctx)

    return client
