"""What an open live page costs the run that it shows: rounds with one and without, in turn."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from sys import executable
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np

from fl_sim.config.experiment import Experiment
from fl_sim.core.observer import SILENT
from fl_sim.simulation.live_log import LiveLog
from fl_sim.simulation.loop import run


@contextmanager
def open_page(folder: Path) -> Iterator[None]:
    """`fl-sim watch FOLDER` in a process of its own, and somebody who asks it once a second, as the page does."""
    process = Popen([executable, "-m", "fl_sim.cli", "watch", str(folder)], stdout=PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    over = threading.Event()

    def ask() -> None:
        while not over.wait(1.0):
            with urllib.request.urlopen(address + "state.json", timeout=10) as answer:
                answer.read()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()
        process.terminate()
        process.wait()


def cost(experiment: Experiment, *, repeats: int) -> Mapping[str, float]:
    """Compare runs with an open page to runs without: medians of paired repetitions, with quartiles.

    Returns:
        Ratios of seconds and of the run's own processor seconds, and the share of a run that writing live.json takes.
    """
    alone, watched, inside = [], [], []
    with TemporaryDirectory() as place:
        for number in range(repeats):
            for page in (False, True) if number % 2 else (True, False):
                out = Path(place) / f"{number}-{page}"
                out.mkdir()
                asked = experiment.model_copy(update={"out": str(out)})
                if page:
                    with open_page(out), timed_log() as spent:
                        watched.append(_seconds(asked))
                        inside.append(spent[0] / watched[-1][0])
                else:
                    alone.append(_seconds(asked))
    ratios = np.array(watched) / np.array(alone)
    found = {"alone_s": float(np.median(alone, axis=0)[0]), "live_log_share": float(np.median(inside))}
    for name, column in zip(("seconds", "processor"), ratios.T, strict=True):
        low, middle, high = np.percentile(column, [25, 50, 75]).tolist()
        found |= {f"{name}_ratio": middle, f"{name}_ratio_q1": low, f"{name}_ratio_q3": high}
    return found


def _seconds(experiment: Experiment) -> tuple[float, float]:
    """Seconds of a run, and of the processor in this process."""
    started = time.process_time()
    wall = run(experiment, SILENT).results.wall_s
    return wall, time.process_time() - started


@contextmanager
def timed_log() -> Iterator[list[float]]:
    """A list whose one entry is the seconds that were spent on writing live.json."""
    spent, write = [0.0], LiveLog._write

    def timed(log: LiveLog) -> None:
        started = time.perf_counter()
        write(log)
        spent[0] += time.perf_counter() - started

    with patch.object(LiveLog, "_write", timed):
        yield spent
