"""Clients that note where they trained, and take long enough to lose their machine meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from clients import presets
from fl_sim.core.types import Task, Update
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training

NOTES = "FL_SIM_TEST_NOTES"
"""Environment variable: a folder where every process has a file of its own."""


def fedavg(*, training: Training, seconds: float) -> Client:
    """As `clients.presets:fedavg`; each client waits for some seconds."""
    inner = presets.fedavg(training=training)

    def client(task: Task, ctx: ClientContext) -> Update:
        with Path(os.environ[NOTES], f"{os.getpid()}").open("a") as file:
            file.write(f"{task.round} {ctx.client}\n")
        time.sleep(seconds)
        return inner(task, ctx)

    return client


def noted(folder: Path, number: int) -> Iterator[tuple[int, list[int]]]:
    """The clients that each process began in a round, in order: (process, clients)."""
    for path in folder.iterdir():
        rows = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
        if clients := [client for round_, client in rows if round_ == number]:
            yield int(path.name), clients


def places(folder: Path, number: int) -> Mapping[int, list[int]]:
    """Client -> the processes that began it in a round."""
    found: dict[int, list[int]] = {}
    for process, clients in noted(folder, number):
        for client in clients:
            found.setdefault(client, []).append(process)
    return found
