"""`live.json` of a run folder: how far the run is, its bytes by section, its warnings. `fl-sim watch` reads it.

The file is replaced at most once a second, and less often where the disk is slow, so that it costs a run a five-hundredth at most.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from fl_sim.communication.ledger import Ledger
from fl_sim.core.observer import Observer
from fl_sim.simulation.live_clients import LiveClients
from fl_sim.training.tasks import Metric

LIVE = "live.json"
INTERVAL_S = 1.0
"""Seconds between two versions of the file, at least."""
REST = 500
"""Times as long as writing one version took, nothing is written, however slow the disk is."""
MESSAGES = 50
"""Newest warnings that are kept."""
log = logging.getLogger("fl_sim")


class LiveLog(logging.Handler):
    """An observer of one run, and a handler of its warnings, that writes `live.json`; a context manager.

    Args:
        folder: the run's.
        ledger: the run's.
        rounds: of the whole run.
        observer: told everything first.
        metric: which column of rounds.jsonl the page draws, and whether it is a share.
        clock: seconds; of a test.
    """

    def __init__(
        self,
        folder: Path,
        ledger: Ledger,
        rounds: int,
        observer: Observer,
        metric: Metric,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(logging.WARNING)
        self._path, self._ledger, self._observer, self._clock = folder / LIVE, ledger, observer, clock
        self._state: dict[str, object] = {"pid": os.getpid(), "rounds": rounds, "round": 0, "answered": 0, "cohort": 0}
        self._state |= {"metric": metric.name, "percent": metric.percent}
        self._messages: deque[str] = deque(maxlen=MESSAGES)
        self._sections: Counter[str] = Counter()
        self._booked, self._written, self._took, self._works = 0, 0.0, 0.0, True
        self._clients = LiveClients(ledger)

    def __enter__(self) -> Self:
        self._state |= {"started": self._clock(), "done_before": None}
        log.addHandler(self)
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        log.removeHandler(self)
        if error is not None:
            self._messages.append(f"stopped: {kind.__name__ if kind else ''}: {error}"[:500])
        self._state["ended"] = self._clock()
        self._write()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning, for instance which client failed and why.

        A logger that has a handler is heard, so that Python prints no warning itself: this handler, which shows nothing,
        would silence a script that sets up no logging.
        """
        if logging.lastResort is not None and self._is_alone():
            logging.lastResort.handle(record)
        message = record.getMessage()
        self._messages.append(message[:500])
        self._clients.warned(message)
        self._soon()

    def _is_alone(self) -> bool:
        """Whether all handlers are logs of runs in progress, of which this is the first: one of them prints."""
        handlers, logger = list(log.handlers), log
        while logger.propagate and logger.parent is not None:
            logger = logger.parent
            handlers += logger.handlers
        return handlers[0] is self and all(isinstance(handler, LiveLog) for handler in handlers)

    def say(self, line: str) -> None:
        """Keep a word about the run, and hand it on."""
        self._messages.append(line[:500])
        self._observer.say(line)

    def reply(self, answered: int, cohort: int) -> None:
        """Count an answer of the round in progress."""
        self._observer.reply(answered, cohort)
        self._state |= {"answered": answered, "cohort": cohort}
        self._soon()

    def round(self, row: Mapping[str, float]) -> None:
        """A round is over."""
        self._observer.round(row)
        number = int(row["round"])
        if self._state["done_before"] is None:
            self._state["done_before"] = number - 1
        self._state |= {"round": number, "answered": 0}
        self._clients.round()
        self._soon()

    def _soon(self) -> None:
        if self._clock() - self._written >= max(INTERVAL_S, REST * self._took):
            self._write()

    def _write(self) -> None:
        if not self._works:
            return
        self._written = self._clock()
        if self._booked > len(self._ledger):  # a round was undone
            self._booked = 0
            self._sections.clear()
        for (way, section), size in self._ledger.total(by=("direction", "section"), start=self._booked).items():
            self._sections[f"{way} {section}"] += size
        self._booked = len(self._ledger)
        told = self._state | self._clients.told() | {"sections": self._sections, "messages": [*self._messages]}
        text = json.dumps(told)
        beside = self._path.with_suffix(".tmp")
        try:
            beside.unlink(missing_ok=True)
            with beside.open("x", encoding="utf-8") as file:
                file.write(text)
            beside.replace(self._path)
            self._took = self._clock() - self._written
        except OSError as error:
            self._works = False  # nobody can watch; the run itself goes on
            log.warning("%s: %s; `fl-sim watch` sees nothing of this run from here on", self._path, error.strerror)
