"""The run folder: its lock, its files, and what a run that starts over removes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fl_sim.communication.payload_log import FOLDER as PAYLOADS
from fl_sim.config.experiment import Experiment, run_folder
from fl_sim.core.files import flush, open_plain, write_atomically
from fl_sim.core.types import Params, UserError
from fl_sim.simulation.checkpoint_store import OBJECTS, Checkpoints
from fl_sim.simulation.identity import IDENTITY, Identity

SUMMARY = "summary.json"
"""Written last and removed first: where it is, the run is complete."""
RESULTS = (SUMMARY, "rounds.jsonl", "ledger.parquet", "masks.parquet", "model.safetensors", "report.html", "live.json")
CHECKPOINTS = "checkpoint"


@dataclass(frozen=True)
class RunFolder:
    """The claimed folder of one run, `<out>/<name>-<id>`.

    Attributes:
        path: of the folder.
        asked: the experiment as the user wrote it; it names the folder and is kept as `config.toml`.
        scratch: an empty file in the folder for the ledger's rows; it goes with the process.
    """

    path: Path
    asked: Experiment
    scratch: BinaryIO

    @property
    def is_finished(self) -> bool:
        """Whether a run ended here."""
        return (self.path / SUMMARY).exists()

    @property
    def checkpoints(self) -> Checkpoints:
        """Checkpoints of this run."""
        return Checkpoints(self.path / CHECKPOINTS)

    def clear(self) -> None:
        """Remove what an earlier run of the same experiment left, so that old and new results never mix."""
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, PAYLOADS):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / IDENTITY).unlink(missing_ok=True)

    def write_inputs(self, label_counts: Iterable[NDArray[np.int64]], identity: Identity) -> None:
        """Write the identity, the config and each client's samples by class (rows, in blocks)."""
        write_atomically(self.path / IDENTITY, (identity.model_dump_json(indent=2) + "\n").encode())
        write_atomically(self.path / "config.toml", (self.asked.to_toml() + "\n").encode())
        rows = ", ".join(json.dumps(block.tolist())[1:-1] for block in label_counts)
        write_atomically(self.path / "partition.json", f"[{rows}]".encode())

    def complete(self, summary: bytes) -> None:
        """Keep only the newest checkpoint, from which more rounds can follow; flush the results; write the summary last."""
        self.checkpoints.keep_newest()
        for name in RESULTS:
            if (self.path / name).exists():
                flush(self.path / name)
        write_atomically(self.path / SUMMARY, summary)
        flush(self.path)


@contextmanager
def claimed(experiment: Experiment) -> Iterator[RunFolder]:
    """Make and lock the experiment's run folder; the lock goes with the process, however it ends.

    Its path is absolute, and the working folder is put back at the end: a client may call `os.chdir`.

    Raises:
        UserError: it cannot be made or written, or another run holds it.
    """
    started = Path.cwd()
    path = started / run_folder(experiment)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{path}: another run is writing into this folder; wait for it or choose another --out"
        ) from error
    except OSError as error:
        raise UserError(f"out = {experiment.out!r}: {error.strerror or error}") from error
    try:
        _require_own(path)
        with _scratch(path) as rows:
            yield RunFolder(path, experiment, rows)
    finally:
        lock.release()
        os.chdir(started)


def _require_own(folder: Path) -> None:
    """Checkpoints delete what they do not know, so a folder from elsewhere must not lead them out of itself."""
    for place in (folder / CHECKPOINTS, folder / CHECKPOINTS / OBJECTS, folder / PAYLOADS):
        if place.is_symlink():
            raise UserError(f"{place}: is a link; a run writes and deletes in its own folder only")


@contextmanager
def _scratch(folder: Path) -> Iterator[BinaryIO]:
    """Make an empty file that is deleted with the block, and with the process; where possible it has no name."""
    try:
        file = TemporaryFile(dir=folder)  # noqa: SIM115, only making it may fail
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from error
    try:
        yield file
    finally:
        with suppress(OSError):  # what a full disk does not take is not wanted any more
            file.close()


def saved_params(folder: Path) -> Params:
    """Read the final parameters of a finished run.

    Raises:
        UserError: they are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    try:
        with open_plain(path):  # a pipe would be waited for
            return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}") from error
