"""What a page needs of a ledger, summed block by block: bytes by part, and what each client of each round moved.

A ledger of 1,000 rounds of 1,000 clients has 8 million rows; no column of it is held whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.sections import BOOKED, CODEC, EXTRA, is_extra
from fl_sim.communication.ledger import CODES, WORDS, Ledger
from fl_sim.communication.virtual_clock import Link

TRAFFIC_KINDS = (*BOOKED, EXTRA, "evaluation", "waste")
"""Sections of the training messages that counted, extra tensors as one; evaluation traffic; training messages that led to no
accepted update."""
SHOWN_WITH = {"config": "auxiliary", "metrics": "auxiliary", CODEC: "values"}
"""Sections that foreign Flower apps alone have, and bytes of a codec of the user's own, which are values."""
TRAIN, UP, OK = CODES["phase"]["train"], CODES["direction"]["up"], CODES["status"]["ok"]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Flows:
    """Sums of a ledger.

    Attributes:
        parts: (direction, part of `TRAFFIC_KINDS`) -> bytes; the sum is every payload byte. Waste is what failed, rejected, late
            or lost clients cost, the models that were sent to them included.
        rounds: round of each task; a task is one client of one round in the training phase. Ascending.
        down, up: bytes of each task.
        has_down, has_up: whether anything moved that way.
    """

    parts: Mapping[tuple[str, str], int]
    rounds: Numbers
    down: Numbers
    up: Numbers
    has_down: NDArray[np.bool_]
    has_up: NDArray[np.bool_]
    _behind: dict[Link, dict[int, float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, ledger: Ledger) -> Flows:
        """Sum a ledger, in two passes: what is waste is known only once all answers were read."""
        keys, sums = _merged(map(_tasks, ledger.blocks()))
        answered = keys[sums[4] > 0]
        counts = np.zeros(2 * len(TRAFFIC_KINDS), np.int64)
        for block in ledger.blocks():
            places, size = _places(block, answered, ledger.words["section"]), block["payload_bytes"]
            counts += [int(size[places == place].sum()) for place in range(len(counts))]
        names = [(way, part) for way in WORDS["direction"] for part in TRAFFIC_KINDS]
        parts = dict(zip(names, counts.tolist(), strict=True))
        return cls(parts, keys >> 32, sums[0], sums[1], sums[2] > 0, sums[3] > 0)

    def seconds(self, link: Link) -> dict[int, float]:
        """Round -> seconds since the start when every client sits behind `link`, and only moving bytes takes time.

        A round lasts as long as its slowest client's download and upload; clients do not share a link. A client that sent
        nothing back waits for no link.
        """
        if link not in self._behind:
            self._behind[link] = self._seconds(link)
        return self._behind[link]

    def _seconds(self, link: Link) -> dict[int, float]:
        spent = np.zeros(len(self.rounds))
        for moved, happened, time in ((self.down, self.has_down, link.down_s), (self.up, self.has_up, link.up_s)):
            distinct, which = np.unique(moved[happened], return_inverse=True)
            spent[happened] += np.array([time(size) for size in distinct.tolist()])[which] if len(distinct) else 0.0
        rounds, starts = np.unique(self.rounds, return_index=True)
        slowest = np.maximum.reduceat(spent, starts) if len(rounds) else spent
        return dict(zip(rounds.tolist(), np.cumsum(slowest).tolist(), strict=True))


def _keys(rows: NDArray[np.void]) -> Numbers:
    """One number for each (round, client), whatever the file says that they are."""
    return (rows["round"].astype(np.int64) << 32) | (rows["client"].astype(np.int64) & 0xFFFFFFFF)


def _tasks(block: NDArray[np.void]) -> tuple[Numbers, Numbers]:
    """(keys, one column a key: bytes down, bytes up, rows down, rows up, accepted rows up) of a block's training rows."""
    rows = block[block["phase"] == TRAIN]
    every = _keys(rows)
    order = np.argsort(every, kind="stable")
    keys, starts = np.unique(every[order], return_index=True)
    up, size = rows["direction"] == UP, rows["payload_bytes"]
    columns = (size * ~up, size * up, ~up, up, up & (rows["status"] == OK))
    sums = [np.add.reduceat(values[order].astype(np.int64), starts) for values in columns if len(keys)]
    return keys, np.array(sums, np.int64).reshape(5, len(keys))


def _merged(pieces: Iterator[tuple[Numbers, Numbers]] | Iterable[tuple[Numbers, Numbers]]) -> tuple[Numbers, Numbers]:
    """The pieces as one: a task may lie on the border of two blocks."""
    every = [(np.zeros(0, np.int64), np.zeros((5, 0), np.int64)), *pieces]
    keys, place = np.unique(np.concatenate([k for k, _ in every]), return_inverse=True)
    sums = np.zeros((5, len(keys)), np.int64)
    start = 0
    for own, columns in every:
        here = place[start : start + len(own)]
        sums[:, here] += columns  # a piece names each of its tasks once
        start += len(own)
    return keys, sums


def _places(block: NDArray[np.void], answered: Numbers, sections: Sequence[str]) -> Numbers:
    """Where each row counts: its direction and part."""
    shown = [EXTRA if is_extra(section) else SHOWN_WITH.get(section, section) for section in sections]
    part = np.array([TRAFFIC_KINDS.index(kind) for kind in shown])[block["section"]]
    train = block["phase"] == TRAIN
    counted = _are_in(answered, _keys(block))
    part = np.where(train, np.where(counted, part, TRAFFIC_KINDS.index("waste")), TRAFFIC_KINDS.index("evaluation"))
    return np.asarray(block["direction"] * np.int64(len(TRAFFIC_KINDS)) + part)


def _are_in(ascending: Numbers, keys: Numbers) -> NDArray[np.bool_]:
    """Whether each key is one of the ascending ones; `np.isin` would sort these again for every block."""
    if not len(ascending):
        return np.zeros(len(keys), np.bool_)
    places = np.searchsorted(ascending, keys)
    return np.asarray(ascending[np.minimum(places, len(ascending) - 1)] == keys)
