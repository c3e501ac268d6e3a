"""Saves and restores the state of a run. A resumed run gives bit-identical results.

The state between two rounds is: of each model the server's (`ServerSnapshot`), of every client what it keeps, three logs
that only grow (ledger, rounds, recorded masks), and a few scalars. Everything random is a function of (seed, round,
partition, purpose), so no generator is saved.
"""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import MaskRecorder
from fl_sim.core.errors import in_one_line
from fl_sim.core.parquet import encoded
from fl_sim.core.types import UserError
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.server_context import ServerSnapshot
from fl_sim.runtime.state.client_states import ClientStates
from fl_sim.runtime.worlds import require_same
from fl_sim.simulation.checkpoint_snapshot import put_snapshot, read_snapshot
from fl_sim.simulation.checkpoint_states import KeptStates
from fl_sim.simulation.checkpoint_store import Chunk, Damaged, Manifest, Put
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.round_hooks import Row, leave_out_undue
from fl_sim.simulation.run_folder import RunFolder
from fl_sim.simulation.server import Server
from fl_sim.training.tasks import learning_task

log = logging.getLogger("fl_sim")
FULL = 1 << 14
"""Entries of a chunk that is not written again: what a checkpoint holds in memory stays bounded, however long the run."""
UNREADABLE = (ValueError, LookupError, TypeError, ArithmeticError, struct.error, RecursionError, SafetensorError)
"""What reading bytes raises whose checksum is right and which no run wrote."""


def grown(chunks: list[Chunk], length: int, *, full: int = FULL) -> tuple[list[Chunk], int]:
    """(chunks to keep, first entry of the next chunk) for a log that now has `length` entries.

    A chunk no longer than what follows it is written again with it, as in a binary counter: of the entries after the last
    full chunk there are O(log full) chunks, and an entry is written O(log full) times.
    """
    kept, stop = list(chunks), chunks[-1].stop if chunks else 0
    while kept:
        start = kept[-2].stop if len(kept) > 1 else 0
        if stop - start > length - stop or max(stop - start, length - stop) >= full:
            break
        kept.pop()
        stop = start
    return kept, stop


@dataclass(frozen=True)
class Log:
    """A log that only grows: its length, its entries from one on as bytes, and how to append an object's entries."""

    length: Callable[[], int]
    since: Callable[[int], bytes]
    extend: Callable[[Path], None]


def _ledger_log(ledger: Ledger) -> Log:
    return Log(lambda: len(ledger), lambda start: encoded(ledger.to_table(start=start)), ledger.extend)


def _rounds_log(rows: list[dict[str, float]]) -> Log:
    def extend(path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a round that is no object")
            rows.append(row)

    return Log(
        lambda: len(rows), lambda start: "".join(json.dumps(row) + "\n" for row in rows[start:]).encode(), extend
    )


def _masks_log(recorder: MaskRecorder) -> Log:
    return Log(lambda: len(recorder.rows), lambda start: encoded(recorder.to_table(start=start)), recorder.extend)


class CheckpointHook:
    """Saves a run after every `checkpoint.every` rounds and after the last, and restores it.

    Attributes:
        saved_round: rounds that the newest checkpoint holds.
        seconds: spent in rounds, stopped runs included.
    """

    def __init__(
        self,
        folder: RunFolder,
        federation: Federation,
        server: Server,
        ledger: Ledger,
        rows: list[Row],
        recorder: MaskRecorder | None,
    ) -> None:
        self.store, self.experiment = folder.checkpoints, folder.asked
        self.precision, self.engine = federation.experiment.training.precision, federation.experiment.engine
        self.models = [
            (track.exchange.schema, model) for track, model in zip(federation.tracks, server.models, strict=True)
        ]
        self.clients, self.world = federation.partitions, federation.world
        self.ledger, self.rows, self.recorder = ledger, rows, recorder
        self.saved_round, self.seconds, self._started = 0, 0.0, time.perf_counter()
        self._clients: tuple[LocalGrid, ClientStates] | None = None
        self._kept = KeptStates()
        self._chunks: dict[str, list[Chunk]] = {}

    def attach(self, grid: LocalGrid, states: ClientStates) -> None:
        """Save the clients of this Grid too: their `states` and the Grid's count of messages. Without it nothing is saved."""
        self._clients = grid, states

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, stopped runs included."""
        return time.perf_counter() - self._started

    def round(self, row: Row) -> None:
        """Save, where it is time; see `Hook`."""
        self.seconds += row["seconds"]
        number, every = int(row["round"]), self.experiment.checkpoint.every
        if self._clients is not None and every and (number % every == 0 or number == self.experiment.rounds):
            self._save(*self._clients)

    def _save(self, grid: LocalGrid, states: ClientStates) -> None:
        """Write a checkpoint of the round just finished.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        saved = [model.saved() for _, model in self.models]
        with self.store.writing() as put:
            manifest = self._manifest(put, saved, grid, states)
        self.store.commit(manifest)
        self.saved_round = manifest.round

    def _logs(self) -> Mapping[str, Log]:
        logs = {"ledger": _ledger_log(self.ledger), "rounds": _rounds_log(self.rows)}
        return logs if self.recorder is None else {**logs, "masks": _masks_log(self.recorder)}

    def _manifest(self, put: Put, saved: Sequence[ServerSnapshot], grid: LocalGrid, states: ClientStates) -> Manifest:
        clients, packs = self._kept.put(put, states)
        return Manifest(
            experiment=self.experiment.id,
            precision=self.precision,
            engine=self.engine,
            world=dict(self.world),
            round=saved[0].round,
            messages=grid.numbered,
            training_s=self.seconds,
            wall_s=self.wall_s,
            models=[put_snapshot(put, each) for each in saved],
            clients=clients,
            packs=packs,
            ledger=self._put_log(put, "ledger"),
            rounds=self._put_log(put, "rounds"),
            masks=self._put_log(put, "masks"),
        )

    def _put_log(self, put: Put, name: str) -> list[Chunk]:
        if (log_ := self._logs().get(name)) is None:
            return []
        length, chunks = log_.length(), self._chunks.get(name, [])
        if length != (chunks[-1].stop if chunks else 0):
            chunks, start = grown(chunks, length)
            chunks = [*chunks, Chunk(name=put(log_.since(start)), stop=length)]
        self._chunks[name] = chunks
        return chunks

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole; without one, from the beginning.

        Logs are appended to in place: a ledger of millions of rows is read in chunks and never held as a value.

        Raises:
            UserError: there are checkpoints and none of them can be read, or the newest is another experiment's, or data,
                models or code are no longer what they were.
        """
        assert self._clients is not None, "clients that live elsewhere keep their own state: nothing was saved"
        for manifest in self.store.manifests():
            try:
                self.store.check(manifest)
            except Damaged as error:
                log.warning("checkpoint of round %d is damaged (%s); trying the one before", manifest.round, error)
                continue
            require_same(manifest.world, self.world, f"{self.store.folder}: this process", "the stopped run")
            try:
                self._apply(manifest, *self._clients)
            except UNREADABLE as error:
                reason = f"is not of this experiment: {in_one_line(error)}"
                raise UserError(f"{self.store.folder}: the checkpoint of round {manifest.round} {reason}") from error
            self.store.resume_from(manifest)
            self.saved_round, self.seconds = manifest.round, manifest.training_s
            self._started -= manifest.wall_s
            log.warning("%s: going on after round %d", self.store.folder.parent, len(self.rows))
            return
        if self.store.any():
            raise UserError(
                f"{self.store.folder}: no checkpoint can be read; --fresh (in Python: fresh=True) starts over"
            )

    def _apply(self, manifest: Manifest, grid: LocalGrid, states: ClientStates) -> None:
        if manifest.experiment != self.experiment.id:
            raise ValueError(f"id {manifest.experiment!r}, not {self.experiment.id!r}")
        for (schema, model), side in zip(self.models, manifest.models, strict=True):
            model.restore(read_snapshot(self.store, manifest.round, side, schema))
        self._kept.restore(self.store, manifest, states)
        for name, log_ in self._logs().items():
            self._chunks[name] = chunks = list(getattr(manifest, name))
            for chunk in chunks:
                log_.extend(self.store.path(chunk.name))
                if log_.length() != chunk.stop:
                    raise ValueError(f"{name}: {log_.length()} entries instead of {chunk.stop}")
        self._check_rows(manifest)
        self._leave_out_undue()
        grid.numbered = manifest.messages

    def _leave_out_undue(self) -> None:
        """Count of a shorter run's rounds only what this run would have evaluated too; the next checkpoint has these rows."""
        for number in leave_out_undue(self.rows, self.experiment):
            self._chunks["rounds"] = []
            log.warning(
                "round %d: its evaluation counts for the shorter run alone, whose last round it was: with evaluate.every = %d "
                "a run of %d rounds does not evaluate it",
                number,
                self.experiment.evaluate.every,
                self.experiment.rounds,
            )

    def _check_rows(self, manifest: Manifest) -> None:
        """The rounds are those that the manifest counts, and their last bytes are the ledger's."""
        numbers = [row.get("round") for row in self.rows]
        if numbers != list(range(1, manifest.round + 1)) or manifest.round > self.experiment.rounds:
            raise ValueError(f"rounds {numbers[:3]}... instead of 1 to {manifest.round}")
        own = {learning_task(self.experiment.task).metric.name, "loss"}
        validated = self.experiment.data.validation and self.experiment.model.personal is None
        measured = own | {f"validation_{name}" for name in own if validated}  # together, or none
        for row in self.rows:
            if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in row.values()):
                raise ValueError(f"round {row['round']}: a column that is no number")
            if measured & row.keys() not in (measured, set()) or not {"seconds", "clients", "density"} <= row.keys():
                raise ValueError(f"round {row['round']}: columns are missing")
        sent = {"uplink_bytes": self.ledger.sent["up"], "downlink_bytes": self.ledger.sent["down"]}
        if self.rows and any(self.rows[-1].get(name) != value for name, value in sent.items()):
            raise ValueError("the rounds and the ledger count different bytes")
        known = range(len(self.clients))
        named = {client for side in manifest.models for client in (*side.answered, *side.holders)}
        named |= {flight.client for side in manifest.models for flight in side.flights}
        if any(
            client not in known for client in named.union(*(c for side in manifest.models for c in side.held.values()))
        ):
            raise ValueError("clients that are not there")
