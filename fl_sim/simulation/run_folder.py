"""The run folder: where it is, who may write into it, and what a run that starts over clears away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from filelock import FileLock, Timeout

from fl_sim.config.experiment import Experiment, run_folder
from fl_sim.core.types import UserError
from fl_sim.simulation.checkpoint_store import OBJECTS

SUMMARY = "summary.json"
"""Written last and removed first: where it is, the run is complete."""
RESULTS = (SUMMARY, "rounds.jsonl", "ledger.parquet", "masks.parquet", "model.safetensors", "report.html")
CHECKPOINTS = "checkpoint"


@contextmanager
def claimed(experiment: Experiment) -> Iterator[Path]:
    """The experiment's run folder, made and locked; the lock goes with the process, however it ends.

    Its path is absolute, and the working folder is put back at the end: a client may call `os.chdir`.

    Raises:
        UserError: it cannot be made or written, or another run holds it.
    """
    started = Path.cwd()
    folder = started / run_folder(experiment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{folder}: another run is writing into this folder; wait for it or choose another --out"
        ) from error
    except OSError as error:
        raise UserError(f"out = {experiment.out!r}: {error.strerror or error}") from error
    try:
        _require_own(folder / CHECKPOINTS)
        yield folder
    finally:
        lock.release()
        os.chdir(started)


def _require_own(checkpoints: Path) -> None:
    """Checkpoints delete what they do not know, so a folder from elsewhere must not lead them out of itself."""
    for place in (checkpoints, checkpoints / OBJECTS):
        if place.is_symlink():
            raise UserError(f"{place}: is a link; checkpoints are written and deleted in the run's own folder only")


@contextmanager
def scratch(folder: Path) -> Iterator[BinaryIO]:
    """An empty file in a claimed folder that goes with the block, and with the process; where it can, without a name.

    Raises:
        UserError: it cannot be made.
    """
    try:
        file = TemporaryFile(dir=folder)  # noqa: SIM115, only making it may fail
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from error
    try:
        yield file
    finally:
        with suppress(OSError):  # what a full disk does not take is not wanted any more
            file.close()


def clear(folder: Path) -> None:
    """Remove what an earlier run of the same experiment left, so that old and new results never mix."""
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
