"""Earlier runs in or beside a run's folder: read, gone on from, or refused; never overwritten unasked."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fl_sim.communication.payload_log import ENDED, ended_at, recorded_files
from fl_sim.communication.payload_log import FOLDER as PAYLOADS
from fl_sim.config.experiment import Experiment, run_folder
from fl_sim.core.types import UserError
from fl_sim.report import Report
from fl_sim.simulation.checkpoint_store import Checkpoints, Damaged, Manifest
from fl_sim.simulation.identity import IDENTITY, Identity, code_of_parts, hash_of_source, recorded
from fl_sim.simulation.run_folder import CHECKPOINTS, SUMMARY, RunFolder

log = logging.getLogger("fl_sim")
FRESH = "--fresh (in Python: fresh=True)"


def finished(experiment: Experiment, hash_data: Callable[[Experiment], str] = hash_of_source) -> Report:
    """The results of a finished run of the same experiment, code and data.

    Args:
        experiment: what is asked; its folder holds a summary.
        hash_data: the hash of its data; several runs of a sweep may share one.

    Raises:
        UserError: the results are damaged, or code or data have changed since.
    """
    path = run_folder(experiment)
    try:
        report = Report.load(path)
    except UserError as error:
        raise UserError(f"{error}; {FRESH} runs it again") from error
    try:
        data = hash_data(experiment)
    except UserError as error:
        log.warning("%s: its data cannot be compared with today's: %s", path, error)
        before = recorded(path)
        data = before.data if before is not None else ""
    require_same(path, experiment, Identity.of(code_of_parts(experiment), data))
    return report


def already_there(report: Report) -> str:
    """`already there (computed by inline)`."""
    return f"already there (computed by {report.summary.get('engine', 'an unknown engine')})"


def require_same(path: Path, experiment: Experiment, now: Identity) -> None:
    """Refuse results or checkpoints in `path` of other code or data; other versions are logged.

    Raises:
        UserError: names what changed.
    """
    before = recorded(path)
    is_finished = (path / SUMMARY).exists()
    if before is None:
        if is_finished or (path / CHECKPOINTS).exists():
            log.warning("%s: no %s, so nothing tells whether its code and data were today's", path, IDENTITY)
        return
    if changed := before.changes(now, experiment.data.source):
        what = ", ".join(changed)
        if is_finished:
            raise UserError(f"{path}: is finished, but since then {what} changed; {FRESH} runs it again")
        raise UserError(f"{path}: cannot go on: since it began {what} changed; {FRESH} starts over")
    if versions := before.other_versions(now):
        log.warning("%s: computed by other versions: %s", path, versions)


def is_finished(experiment: Experiment) -> bool:
    """Whether a run of this experiment ended."""
    return (run_folder(experiment) / SUMMARY).exists()


def is_stopped(experiment: Experiment) -> bool:
    """Whether a run of this experiment stopped and kept checkpoints."""
    return not is_finished(experiment) and Checkpoints(run_folder(experiment) / CHECKPOINTS).any()


def prepare(folder: RunFolder, *, resume: bool, fresh: bool) -> None:
    """Say or refuse what starting in this folder means for what a stopped run left there.

    Raises:
        UserError: rounds are kept, and neither `resume` nor `fresh` was asked for.
    """
    has_kept = folder.checkpoints.any()
    if has_kept and not (resume or fresh):
        newest = next(folder.checkpoints.manifests(), None)
        rounds = "checkpoints that cannot be read" if newest is None else f"{newest.round} finished rounds"
        raise UserError(f"{folder.path}: {rounds} are kept; --resume (resume=True) goes on, {FRESH} starts over")
    if not has_kept and not fresh and _has_rows(folder.path):
        log.warning("%s: a stopped run that kept no checkpoints is started over", folder.path)
    elif resume and not has_kept and not _extend(folder):
        log.warning("%s: nothing to resume, starting at round 1", folder.path)


def _has_rows(path: Path) -> bool:
    rows = path / "rounds.jsonl"
    return rows.is_file() and rows.stat().st_size > 0


def _extend(folder: RunFolder) -> bool:
    """Take over the newest checkpoint of a run that differs in fewer `rounds` only; False where there is none."""
    asked = folder.asked
    best: tuple[int, Path] | None = None
    for path in sorted(folder.path.parent.glob(f"{asked.name}-????????")):
        if path == folder.path or (shorter := _shorter(path, asked)) is None:
            continue
        if asked.local_training != asked.training:
            log.warning(
                "%s: the same but for its rounds, over which training.decay is spread; set training.decay_end", path
            )
            continue
        newest = next(Checkpoints(path / CHECKPOINTS).manifests(), None)
        if newest is None:
            log.warning("%s: the same but for its rounds, but it kept no checkpoint", path)
        elif newest.round >= asked.rounds:
            continue
        elif _measured_its_end(newest, shorter):
            log.warning(
                "%s: the same but for its rounds, but in its last round, %d, clients measured over-fitting (evaluate.fit), and "
                "their messages were longer; allowed to go on from: a last round that evaluate.every = %d divides",
                path,
                shorter.rounds,
                shorter.evaluate.every,
            )
        elif best is None or newest.round > best[0]:
            best = newest.round, path
    return best is not None and _take_over(best[1], folder)


def _measured_its_end(newest: Manifest, shorter: Experiment) -> bool:
    """Whether clients measured over-fitting in a checkpoint's round because it was the last: a longer run has other messages."""
    return bool(shorter.evaluate.fit) and newest.round == shorter.rounds and shorter.rounds % shorter.evaluate.every > 0


def _shorter(path: Path, asked: Experiment) -> Experiment | None:
    """The experiment of a folder's run, where it is the one that is asked for but for its number of rounds."""
    with suppress(UserError):  # a folder of something else, or damaged: it is not asked for
        if (path / "config.toml").is_file() and not (path / CHECKPOINTS).is_symlink():
            other = Experiment.load(path / "config.toml")
            return other if other.model_copy(update={"rounds": asked.rounds}).id == asked.id else None
    return None


def _take_over(source: Path, folder: RunFolder) -> bool:
    """Copy the newest checkpoint of `source` that is whole; it becomes one of this experiment."""
    theirs = Checkpoints(source / CHECKPOINTS)
    lock = FileLock(source / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s: the same but for its rounds, but it is running", source)
        return False
    try:
        for manifest in theirs.manifests():
            try:
                theirs.check(manifest)
            except Damaged as error:
                log.warning("%s: the checkpoint of round %d is damaged (%s)", source, manifest.round, error)
                continue
            _copy(manifest, source, folder)
            log.warning("%s: going on from round %d of %s", folder.path, manifest.round, source)
            return True
    finally:
        lock.release()
    return False


def _copy(manifest: Manifest, source: Path, folder: RunFolder) -> None:
    """Link or copy the objects, which nobody ever changes; then the identity; the manifest last."""
    theirs, ours = Checkpoints(source / CHECKPOINTS), folder.checkpoints
    with ours.writing():
        pass  # makes the folders
    for name in manifest.objects:
        _link(theirs.path(name), ours.path(name))
    for number, path in recorded_files(source / PAYLOADS):
        if number <= manifest.round:
            (folder.path / PAYLOADS).mkdir(exist_ok=True)
            _link(path, folder.path / PAYLOADS / path.name)
    if (ended := ended_at(source / PAYLOADS)) is not None and ended <= manifest.round:
        (folder.path / PAYLOADS).mkdir(exist_ok=True)
        _link(source / PAYLOADS / ENDED, folder.path / PAYLOADS / ENDED)
    if (source / IDENTITY).is_file():
        shutil.copyfile(source / IDENTITY, folder.path / IDENTITY)
    ours.commit(manifest.model_copy(update={"experiment": folder.asked.id}))


def _link(source: Path, target: Path) -> None:
    """Link, or copy where a link is not possible, a file that nobody ever changes in place."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
