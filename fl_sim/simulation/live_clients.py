"""States of the clients of a round in progress, read from the ledger's newest rows: nothing is counted client by client."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from fl_sim.communication.ledger import CODES, WORDS, Ledger

SHOWN = 200
"""Clients whose states are kept one by one; of a larger cohort only the counts are."""
OFTEN = 8
"""Clients that failed most often, which are named."""
TRAINING, ANSWERED, FAILED = "training", "answered", "failed"
_WARNING = re.compile(r"round \d+: client (\d+):")


def states(ledger: Ledger, rows: slice, failed: Iterable[int] = ()) -> dict[int, str]:
    """Client -> training, answered, late, rejected or failed, of the training messages in these rows of the ledger."""
    columns = {name: ledger.column(name, start=rows.start)[: rows.stop - rows.start] for name in _COLUMNS}
    trained = (columns["phase"] == CODES["phase"]["train"]) & (columns["section"] == CODES["section"]["header"])
    up = trained & (columns["direction"] == CODES["direction"]["up"])
    found = dict.fromkeys(np.unique(columns["client"][trained & ~up]).tolist(), TRAINING)
    for client, status in zip(columns["client"][up].tolist(), columns["status"][up].tolist(), strict=True):
        word = WORDS["status"][status]
        found[client] = ANSWERED if word == "ok" else word
    return found | {client: FAILED for client in failed if found.get(client, TRAINING) == TRAINING}


_COLUMNS = ("client", "direction", "phase", "section", "status")


@dataclass
class LiveClients:
    """Where each client of the newest round stands, and who failed how often.

    Attributes:
        ledger: of the run.
    """

    ledger: Ledger
    _begun: int = 0
    _before: slice = field(default_factory=lambda: slice(0, 0))
    _failed: dict[bool, set[int]] = field(default_factory=lambda: {True: set(), False: set()})
    _failures: Counter[int] = field(default_factory=Counter)

    def warned(self, message: str) -> None:
        """Take the client's number from a warning, where there is one."""
        if (found := _WARNING.match(message)) is not None:
            self._failed[True].add(int(found[1]))
            self._failures[int(found[1])] += 1

    def round(self) -> None:
        """A round is over: it is shown until the next one has sent its tasks."""
        self._before, self._begun = slice(self._begun, len(self.ledger)), len(self.ledger)
        self._failed = {True: set(), False: self._failed[True]}

    def told(self) -> dict[str, object]:
        """As JSON: `states` of single clients or of all together, and `failures` of those that failed most often."""
        if self._begun > len(self.ledger):  # a round was undone
            self._begun, self._before = len(self.ledger), slice(0, 0)
            self._failed = {True: set(), False: set()}
        running = len(self.ledger) > self._begun
        rows = slice(self._begun, len(self.ledger)) if running else self._before
        found = states(self.ledger, rows, self._failed[running])
        single = [[client, state] for client, state in sorted(found.items())] if len(found) <= SHOWN else []
        return {
            "clients": single,
            "states": Counter(found.values()),
            "failures": self._failures.most_common(OFTEN),
        }
