"""Run an experiment from start to report: `run`. The round loop is in `serve`.

>>> from fl_sim import Experiment, run
>>> report = run(Experiment.load("configs/quickstart.toml"))
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from flwr.serverapp import Grid

from fl_sim.codecs import CorruptPayload
from fl_sim.communication.flower_private import RUN_ID, identified
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import MaskRecorder
from fl_sim.communication.payload_log import FOLDER as PAYLOADS
from fl_sim.communication.payload_log import PayloadRecorder
from fl_sim.config.experiment import Experiment
from fl_sim.core.errors import USERS_OWN, UserError, error_line, in_one_line, users_line
from fl_sim.core.observer import SILENT, Observer
from fl_sim.report import Report
from fl_sim.report.progress import shown
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.state.client_states import ClientStates
from fl_sim.simulation.checkpointing import CheckpointHook
from fl_sim.simulation.client_side import attackers_of
from fl_sim.simulation.earlier_runs import already_there, finished, prepare, require_same
from fl_sim.simulation.engines import open_grid, settled, settled_by_model
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.identity import Identity, hash_of, test_hashes
from fl_sim.simulation.interrupts import Interrupts
from fl_sim.simulation.live_log import LiveLog
from fl_sim.simulation.model_facts import dense_payloads
from fl_sim.simulation.parts import check, check_built
from fl_sim.simulation.results import finish
from fl_sim.simulation.round_hooks import Evaluation, Folded, Hook, RoundsFile, Row, client_options, round_row
from fl_sim.simulation.run_folder import RunFolder, claimed, saved_params
from fl_sim.simulation.server import build_server
from fl_sim.simulation.stopping import ByteBudget, Stopping
from fl_sim.training.precision import PRECISIONS
from fl_sim.training.tasks import learning_task

log = logging.getLogger("fl_sim")


class RunStopped(RuntimeError):
    """A run that could not go on; what it had finished is on disk."""


def run(
    experiment: Experiment,
    observer: Observer | None = None,
    *,
    resume: bool = False,
    fresh: bool = False,
    quiet: bool | None = None,
) -> Report:
    """Run an experiment on its engine; writes `<out>/<name>-<id>/` and returns the same as a value.

    Nothing is overwritten unasked. A finished run of the same experiment, code and data is read and the log says so,
    whichever engine computed it. Rounds that a stopped run finished are refused unless `resume` or `fresh` is given.

    Args:
        experiment: what to run.
        observer: a display or tracker; None = the progress display of the command line.
        resume: go on after the last checkpoint of a stopped run, or of one that differs in fewer `rounds` only. Results
            are bit-identical to those of a run that never stopped.
        fresh: start over, in the place of what is there.
        quiet: show no display; None = only where standard output is no terminal and no notebook. An `observer` is called
            in any case.

    Raises:
        UserError: the experiment asks for something impossible, another run holds the folder, rounds of a stopped run
            are kept, or what is there was computed with other code or data.
        RunStopped: too few usable updates in a round, or a folder that cannot be written.
    """
    if resume and fresh:
        raise UserError("resume and fresh: give one of them")
    with shown(experiment, observer, quiet=quiet) as chosen:
        return _run(experiment, chosen, resume=resume, fresh=fresh)


def _run(experiment: Experiment, observer: Observer, *, resume: bool, fresh: bool) -> Report:
    by_rule = experiment.engine == "auto"
    experiment, why = settled(experiment)
    check(experiment)
    with claimed(experiment) as folder:
        if folder.is_finished and not fresh:
            there = finished(experiment)
            log.warning("%s: %s; --fresh (in Python: fresh=True) runs it again", folder.path, already_there(there))
            return replace(there, params=saved_params(folder.path))
        prepare(folder, resume=resume, fresh=fresh)
        federation = Federation.build(experiment, precision=_precision_before(folder) if resume else None)
        check_built(federation)
        before = _engine_before(folder) if resume else None
        if by_rule and why is not None:
            federation, why = settled_by_model(federation, why, before=before)
            observer.say(why)
            folder = replace(folder, asked=folder.asked.model_copy(update={"engine": federation.experiment.engine}))
        _say_other_rounding(federation.experiment.engine, before)
        identity = Identity.of(federation.code, hash_of(federation.data), test_hashes(federation.data))
        if resume:
            require_same(folder.path, experiment, identity)
        # The length of a run id counts in Flower's traffic: one that a Flower run of this process left must not.
        with identified(RUN_ID), open_grid(federation) as grid:
            return serve(federation, grid, folder, identity, observer, resume=resume)


def resume(experiment: Experiment, observer: Observer | None = None, *, quiet: bool | None = None) -> Report:
    """Finish a run that was killed or stopped, or extend one to more rounds: `run` with `resume=True`."""
    return run(experiment, observer, resume=True, quiet=quiet)


def serve(
    federation: Federation,
    grid: Grid,
    folder: RunFolder,
    identity: Identity,
    observer: Observer = SILENT,
    *,
    resume: bool = False,
) -> Report:
    """Run the rounds of a federation over any Grid, and write the results.

    On Grids of this package clients' state is checkpointed; on others clients keep their own.

    Raises:
        UserError: no checkpoint can be read.
        RunStopped: a round failed, or the folder cannot be written.
    """
    ledger, rows = Ledger(folder.scratch), list[Row]()
    recorder = MaskRecorder([]) if federation.experiment.wire.record_masks else None
    payloads = _payloads(federation.experiment, folder)
    server = build_server(federation, ledger, recorder, payloads, folder.path)
    for track in federation.tracks:
        track.give_up_first_values()  # the server has its own
    dense = dense_payloads(federation)
    dense.tell_frozen(federation.experiment.model.name)
    stopping, budget = Stopping(federation.experiment), ByteBudget(federation.experiment, server, ledger, recorder)
    checkpoint = CheckpointHook(folder, federation, server, ledger, rows, recorder)
    if isinstance(grid, LocalGrid):
        grid.contexts = states = ClientStates(grid.contexts.nodes, folder.path)
        checkpoint.attach(grid, states)
    elif budget.limit is not None:
        raise UserError(
            "stop.mb: clients of this runtime really run, so that a round cannot be undone; use an engine here"
        )
    if resume:
        checkpoint.restore()
    else:
        folder.clear()  # an engine that did not start has left the earlier results
    options, rounds = client_options(federation.experiment), federation.experiment.rounds
    with _stopping(folder, checkpoint):
        if (personal := federation.experiment.model.personal) is not None:
            log.warning(
                "model.personal = %r: model.safetensors will hold the shared parts as trained, and personal parts as built "
                "from the seed; a round's metrics are those of the clients' own models",
                personal,
            )
        if attackers := attackers_of(federation.experiment):
            told = ", ".join(map(str, attackers[:10])) + (", ..." if len(attackers) > 10 else "")
            log.warning("attack: %d of %d clients attack: %s", len(attackers), len(federation.partitions), told)
        folder.write_inputs(federation.label_counts(), identity)
        recording = [] if payloads is None else [payloads]
        metric = learning_task(federation.experiment.task).metric
        live_log = LiveLog(folder.path, ledger, rounds, observer, metric)
        with RoundsFile(folder.path, rows) as rounds_file, live_log as live, Interrupts() as interrupts:
            measuring = Evaluation(federation, server, ledger, dense)
            folded = Folded(grid, live.say)
            hooks: list[Hook] = [measuring, stopping, rounds_file, *recording, checkpoint, live, folded, interrupts]
            for row in rows:
                stopping.round(row)
            while stopping.reason is None and len(rows) < rounds:
                started, number = time.perf_counter(), len(rows) + 1
                stopping.reason = budget.fits(number, lambda: server.round(grid, options, live.reply))
                if stopping.reason is None:
                    row = round_row(number, time.perf_counter() - started, server, ledger)
                    for hook in hooks:
                        hook.round(row)
            if stopping.reason is not None:
                live.say(f"stopped {stopping.reason}")
            if metric.name not in rows[-1]:  # the round that turned out to be the last was not due for an evaluation
                measuring.complete(rows[-1])
                rounds_file.rewrite()
        return finish(
            federation,
            server,
            folder,
            ledger=ledger,
            rows=rows,
            recorder=recorder,
            dense=dense,
            stopped=stopping.reason,
            training_s=checkpoint.seconds,
            wall_s=checkpoint.wall_s,
        )


def _payloads(experiment: Experiment, folder: RunFolder) -> PayloadRecorder | None:
    every, megabytes = experiment.wire.record_payloads, experiment.wire.record_megabytes
    return PayloadRecorder(folder.path / PAYLOADS, every, int(megabytes * 1e6)) if every else None


def _precision_before(folder: RunFolder) -> str | None:
    """The precision that the stopped run computed in: a probe of the machine now may choose another."""
    manifests = folder.checkpoints.manifests()
    return next((each.precision for each in manifests if each.precision in PRECISIONS), None)


def _say_other_rounding(engine: str, before: str | None) -> None:
    """Say where the rounds of a stopped run go on with an engine whose last bits are others."""
    if before is not None and before != engine and "cohort" in (before, engine):
        log.warning(
            "engine: %s goes on with rounds of %s: the results are equal up to rounding to those of a run that never stopped",
            engine,
            before,
        )


def _engine_before(folder: RunFolder) -> str | None:
    """The engine of the stopped run; None where its checkpoints do not say."""
    return next((each.engine for each in folder.checkpoints.manifests() if each.engine), None)


@contextmanager
def _stopping(folder: RunFolder, checkpoint: CheckpointHook) -> Iterator[None]:
    """Raise RunStopped for whatever stops the rounds, and say which of them are safe."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, CorruptPayload, struct.error) as error:
        said = in_one_line(error)
        reason = f"{error.filename or folder.path}: {error.strerror or said}" if isinstance(error, OSError) else said
        raise RunStopped(reason + _kept(checkpoint)) from error
    except USERS_OWN as error:
        if isinstance(error, UserError) or not users_line(error):
            raise
        raise RunStopped(error_line(error) + _kept(checkpoint)) from error


def _kept(checkpoint: CheckpointHook) -> str:
    kept = checkpoint.saved_round
    return f"; {kept} finished rounds are kept, --resume goes on from there" if kept else ""
