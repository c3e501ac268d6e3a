"""What an open live page costs the run that it shows: the same rounds with one and without, in turn.

A run is cut into blocks of rounds. In every second block the page is open; in the others its processes stand still. The next
run of the same experiment swaps the two, so that each block was timed both ways, and a machine that slows down meanwhile
slows both.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from math import comb
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np

from fl_sim.cli.live_reader import ASKS_EVERY_S
from fl_sim.config.experiment import Experiment, run_folder
from fl_sim.core.errors import UserError
from fl_sim.core.observer import Silent
from fl_sim.simulation.live_log import LiveLog
from fl_sim.simulation.loop import run

SETTLES_S = 3.0
"""Seconds that a page has to load and to draw before a run begins."""
LEAST_PAIRS = 6
"""Pairs of neighbouring blocks in all runs, below which there is no 95 % interval of their median."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page:
    """`fl-sim watch FOLDER` and somebody who looks at it, in processes of their own that can be halted together.

    Attributes:
        group: the process group of both.
    """

    def __init__(self, folder: Path, profile: Path, browser: str | None) -> None:
        watch = [sys.executable, "-m", "fl_sim.cli", "watch", str(folder), "--parent", str(os.getpid())]
        self._watch = Popen(watch, stdout=PIPE, text=True, process_group=0)
        assert self._watch.stdout is not None
        address = self._watch.stdout.readline().split()[-1]
        headless = ["--headless", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}", address]
        asking = [sys.executable, "-m", "fl_sim.cli.live_reader", address]
        self.group = self._watch.pid
        reader = asking if browser is None else [browser, *headless]
        self._reader = Popen(reader, process_group=self.group, stderr=DEVNULL)
        time.sleep(SETTLES_S)

    def open(self, wanted: bool) -> None:
        """Let its processes work, or let them stand still."""
        os.killpg(self.group, signal.SIGCONT if wanted else signal.SIGSTOP)

    def close(self) -> None:
        """End its processes."""
        self.open(True)
        for process in (self._reader, self._watch):
            process.terminate()
            process.wait()

    def processor_s(self) -> float:
        """Seconds of the processor that its processes have taken so far, those of the browser included (Linux)."""
        ticks = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                words = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if int(words[2]) == self.group:
                ticks += int(words[11]) + int(words[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Blocks(Silent):
    """An observer that times blocks of rounds, and opens the page in every second one.

    Attributes:
        page: what is opened and halted.
        size: rounds of a block.
        first: whether the page is open in the first block.
        seconds: of each block: of the clock, and of this process's processor time.
        open: seconds for which the page was open.
    """

    page: Page
    size: int
    first: bool
    seconds: list[tuple[float, float]] = field(default_factory=list)
    open: float = 0.0
    _since: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """The first block begins."""
        self.page.open(self.first)
        self._since = time.perf_counter(), time.process_time()

    def round(self, row: Mapping[str, float]) -> None:
        """A round is over, and with it perhaps a block."""
        if int(row["round"]) % self.size:
            return
        now = time.perf_counter(), time.process_time()
        took = now[0] - self._since[0], now[1] - self._since[1]
        self.open += took[0] if (len(self.seconds) % 2 == 0) == self.first else 0.0
        self.seconds.append(took)
        self.page.open((len(self.seconds) % 2 == 0) == self.first)
        self._since = time.perf_counter(), time.process_time()


def cost(experiment: Experiment, *, repeats: int, block: int, browser: bool) -> Mapping[str, float]:
    """Compare rounds under an open page to the same rounds without one.

    Args:
        experiment: what runs, twice in each repetition.
        repeats: pairs of runs.
        block: rounds after which the page opens or closes.
        browser: a real one shows the page, without a window; else a process that sends the page's requests.

    Returns:
        Ratios of seconds and of the run's own processor seconds: medians over pairs of neighbouring blocks, with 95 %
        confidence intervals; the share of one core that the page's processes take while it is open; the share of a run
        that writing live.json takes.

    Raises:
        UserError: the runs have fewer than six pairs of blocks, or there is no browser.
    """
    pairs = (experiment.rounds // block - 1) // 2 * repeats  # the first block is left out: kernels and caches warm up
    if pairs < LEAST_PAIRS:
        raise UserError(
            f"rounds: {repeats} times {experiment.rounds} rounds hold {max(0, pairs)} pairs of blocks of {block} rounds after "
            f"the first block; {LEAST_PAIRS} at least"
        )
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser and found is None:
        raise UserError(f"--browser: none of {', '.join(BROWSERS)} is installed")
    logs, inside, page_s, open_s = [], [], 0.0, 0.0
    with TemporaryDirectory() as place, opened(Path(place), found if browser else None) as page:
        asked = experiment.model_copy(update={"out": str(Path(place) / "runs")})
        for number in range(repeats):
            both = []
            for first in (True, False) if number % 2 else (False, True):
                blocks = Blocks(page, block, first)
                before = page.processor_s()
                with timed_log() as spent:
                    blocks.begin()
                    whole = run(asked, blocks).results.wall_s
                page.open(True)
                page_s += page.processor_s() - before
                open_s += blocks.open
                inside.append(spent[0] / whole)
                shutil.rmtree(run_folder(asked))
                time.sleep(2 * ASKS_EVERY_S)  # the page sees that the run is gone
                both.append((first, np.array(blocks.seconds)))
            (_, watched), (_, alone) = sorted(both, key=lambda each: not each[0])
            swap = np.where(np.arange(len(alone)) % 2, -1, 1)[:, None]
            logs.append((swap * np.log(watched / alone))[1:])
    return _intervals(logs) | {
        "page_share_of_a_core": page_s / open_s,
        "live_log_share": float(np.median(inside)),
    }


def _intervals(logs: list[np.ndarray]) -> dict[str, float]:
    """Ratios with 95 % intervals, of log ratios of blocks; two neighbours together cancel what one run had as a whole.

    Medians, because whatever else the machine does disturbs few blocks, and these a lot.
    """
    pairs = np.sort(
        np.concatenate([each[: len(each) // 2 * 2].reshape(-1, 2, 2).mean(axis=1) for each in logs]), axis=0
    )
    count = len(pairs)
    # The interval is one of order statistics: each pair is above the median with probability 1/2, whatever its distribution.
    tails = accumulate(comb(count, below) for below in range(count))
    outside = sum(tail <= 0.025 * 2**count for tail in tails) - 1
    found: dict[str, float] = {"pairs_of_blocks": count}
    for index, name in enumerate(("seconds", "processor")):
        column = np.exp(pairs[:, index])
        found[f"{name}_ratio"] = float(np.median(column))
        found |= {f"{name}_ratio_low": float(column[outside]), f"{name}_ratio_high": float(column[-1 - outside])}
    return found


@contextmanager
def opened(folder: Path, browser: str | None) -> Iterator[Page]:
    """A page of a folder's runs, open; its processes end with this one, unless that is killed without a word."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    page = Page(folder / "runs", folder / "profile", browser)
    try:
        yield page
    finally:
        page.close()
        signal.signal(signal.SIGTERM, before)


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
