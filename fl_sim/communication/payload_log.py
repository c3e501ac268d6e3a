"""Recorded payloads: what moved in chosen rounds, kept so that `fl-sim replay` can encode it again.

A run with `wire.record_payloads = n` leaves `payloads/round-00000001.safetensors` and so on for every n-th round. A file holds
the round's distinct payloads and held masks as bytes, and one row for each message: which payload it carried, to or from
which client, and which mask the receiver held. A payload that several clients get is kept once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fl_sim.communication.ledger import CODES, WORDS, Ledger
from fl_sim.core.files import read_plain, write_atomically
from fl_sim.core.types import UserError

log = logging.getLogger("fl_sim")
FOLDER = "payloads"
ENDED = "ended-at-round"
"""A file with the first round that would have exceeded the limit: from there on nothing is recorded, in a resumed run neither."""
MESSAGES = "messages"
COLUMNS = 5
"""Direction, phase, client, number of the payload, number of the held mask or -1."""
_NAME = re.compile(r"^round-(\d{8})\.safetensors$")

Bits = NDArray[np.bool_]


@dataclass
class PayloadRecorder:
    """Collects the payloads of a round, and writes them when it is over.

    Attributes:
        folder: receives a file for each recorded round.
        every: rounds 1, 1 + every, 1 + 2 every, ... are recorded.
        limit: bytes that all files together may take; the first round that would take more ends the recording.
    """

    folder: Path
    every: int
    limit: int
    _rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    _blobs: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    _size: int = 0

    def add(
        self, *, round: int, direction: str, phase: str, client: int, payload: bytes | memoryview, held: Bits | None
    ) -> None:
        """Keep one message; `held` is the mask that its receiver held, over the prunable coordinates."""
        if (round - 1) % self.every or not _is_before(round, ended_at(self.folder)):
            return
        mask = -1 if held is None else self._kept(np.packbits(held).tobytes())
        self._rows.append((CODES["direction"][direction], CODES["phase"][phase], client, self._kept(payload), mask))

    def _kept(self, blob: bytes | memoryview) -> int:
        name = xxhash.xxh3_128_digest(blob)
        if name not in self._blobs:
            self._blobs[name] = len(self._blobs), bytes(blob)
            self._size += len(blob)
        return self._blobs[name][0]

    def round(self, row: Mapping[str, float]) -> None:
        """Write what the round moved; see `fl_sim.simulation.round_hooks.Hook`.

        Raises:
            OSError: the folder cannot be written.
        """
        number = int(row["round"])
        if self._rows:
            if self._size + self._spent(number) > self.limit:
                self.folder.mkdir(exist_ok=True)
                write_atomically(self.folder / ENDED, f"{number}\n".encode())
                log.warning(
                    "round %d: its payloads would exceed wire.record_megabytes = %g; none is recorded from here on",
                    number,
                    self.limit / 1e6,
                )
            else:
                self._write(number)
        self._rows, self._blobs, self._size = [], {}, 0

    def _spent(self, number: int) -> int:
        """Bytes of the files of earlier rounds."""
        return sum(path.stat().st_size for earlier, path in recorded_files(self.folder) if earlier < number)

    def _write(self, number: int) -> None:
        arrays = {str(at): np.frombuffer(blob, np.uint8) for at, blob in self._blobs.values()}
        self.folder.mkdir(exist_ok=True)
        messages = np.array(self._rows, np.int64)
        write_atomically(self.folder / f"round-{number:08d}.safetensors", save({MESSAGES: messages, **arrays}))


@dataclass(frozen=True)
class Recorded:
    """One recorded message.

    Attributes:
        direction, phase, client: as in the ledger.
        payload: its bytes.
        held: the mask that its receiver held, as packed bits; None = none.
    """

    direction: str
    phase: str
    client: int
    payload: bytes
    held: bytes | None


def recorded_files(folder: Path) -> list[tuple[int, Path]]:
    """(round, file) of the recorded rounds, in order."""
    found = ((_NAME.match(path.name), path) for path in folder.glob("round-*.safetensors"))
    return sorted((int(match[1]), path) for match, path in found if match)


def ended_at(folder: Path) -> int | None:
    """The first round that was not recorded because of the limit; None where all were.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / ENDED
    if not path.exists():
        return None
    try:
        return int(read_plain(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; needed: the number of a round") from error


def missing_rounds(folder: Path, every: int, ledger: Ledger) -> list[int]:
    """Rounds of a ledger whose payloads were recorded and are not there any more.

    Args:
        folder: recorded payloads of a run.
        every: every how many rounds were recorded; 0 = none.
        ledger: of the run.

    Raises:
        UserError: `ended_at` cannot be read.
    """
    end, there = ended_at(folder), {number for number, _ in recorded_files(folder)}
    moved = set(ledger.column("round").tolist())
    due = (number for number in sorted(moved) if every and (number - 1) % every == 0)
    return [number for number in due if _is_before(number, end) and number not in there]


def _is_before(number: int, end: int | None) -> bool:
    return end is None or number < end


def require_recorded(folder: Path, every: int, ledger: Ledger) -> None:
    """Refuse a recording of which rounds are missing.

    Raises:
        UserError: names the rounds.
    """
    if missing := missing_rounds(folder, every, ledger):
        told = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise UserError(
            f"{folder}: the recorded payloads of round {told} are missing (wire.record_payloads = {every}); put the files "
            f"back, or run it again with --fresh; where wire.record_megabytes ended the recording, the file {ENDED} names the "
            "first round without"
        )


def read_round(path: Path) -> Iterator[Recorded]:
    """The messages of one recorded round, in the order in which they were booked.

    Raises:
        UserError: not a file of recorded payloads.
    """
    try:
        arrays = load(read_plain(path))
        rows = arrays.pop(MESSAGES)
        if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != COLUMNS:
            raise ValueError(f"messages of {rows.dtype} and shape {rows.shape}")
        blobs = {int(name): array.astype(np.uint8, casting="no").tobytes() for name, array in arrays.items()}
        for direction, phase, client, payload, held in rows.tolist():
            if not (0 <= direction < len(WORDS["direction"]) and 0 <= phase < len(WORDS["phase"])):
                raise ValueError(f"direction {direction} and phase {phase}")
            mask = None if held == -1 else blobs[held]
            yield Recorded(WORDS["direction"][direction], WORDS["phase"][phase], client, blobs[payload], mask)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: not the payloads of a round: {str(error).splitlines()[0]}") from error
