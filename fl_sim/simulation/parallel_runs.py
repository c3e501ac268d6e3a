"""Several runs of a grid at once, each in a process of its own.

for outcome in outcomes(experiments, jobs=4, fresh=False, here=train): ...
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from fl_sim.config.experiment import Experiment, run_folder
from fl_sim.core.errors import in_one_line
from fl_sim.core.types import UserError
from fl_sim.report import Report
from fl_sim.runtime.grids import forkserver
from fl_sim.simulation.earlier_runs import is_finished, is_stopped
from fl_sim.simulation.loop import run
from fl_sim.simulation.sweep import Outcome, sweep


def outcomes(
    experiments: Sequence[Experiment], *, jobs: int, fresh: bool, here: Callable[[Experiment], Report]
) -> Iterator[Outcome]:
    """Outcomes in the order of the list, as `sweep` has them.

    Args:
        experiments: what to run.
        jobs: runs at once. With 1, `here` runs each in this process.
        fresh: run what is finished too, in its place.
        here: runs one experiment to its end.
    """
    if jobs == 1:
        yield from sweep(experiments, here, there=lambda each: not fresh and is_finished(each))
        return
    with ParallelRuns(experiments, jobs=jobs, fresh=fresh) as runs:
        yield from sweep(experiments, runs, there=runs.were_there)


class ParallelRuns:
    """Processes that run experiments in order, `jobs` at once; called with one of them, it waits for that one's report.

    A process does one run after another and imports once. An experiment that stands twice in the list is run once. Left by
    an exception, it ends its processes; their runs kept what they had saved.

    Args:
        experiments: what will be asked for, in order.
        jobs: processes, at least 1.
        fresh: run finished ones too, in their place.
    """

    def __init__(self, experiments: Sequence[Experiment], *, jobs: int, fresh: bool = False) -> None:
        waiting: dict[Path, Experiment] = {}
        for each in experiments:
            if fresh or not is_finished(each):
                waiting.setdefault(run_folder(each), each)  # on another engine it is the same experiment
        others = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(
            min(jobs, max(1, len(waiting))), multiprocessing.get_context("spawn"), initializer=_prepare
        )
        self._runs: dict[Path, Future[tuple[str, bool]]] = {
            folder: self._pool.submit(_run, each, fresh) for folder, each in waiting.items()
        }
        self._processes = set(multiprocessing.active_children()) - others

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            for process in self._processes:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def were_there(self, experiment: Experiment) -> bool:
        """Whether nothing is to be run: its results were there before, or were asked for and given already."""
        return run_folder(experiment) not in self._runs

    def __call__(self, experiment: Experiment) -> Report:
        """The report of an experiment of the list, when its run has ended.

        Raises:
            UserError: its run refused the input. RuntimeError: it failed, or its process ended.
        """
        folder = run_folder(experiment)
        reason, refused = self._runs.pop(folder).result()
        if reason:
            raise UserError(reason) if refused else RuntimeError(reason)
        return Report.load(folder)


def _prepare() -> None:
    """In each process: it ends with its parent; an interrupt of the terminal is the parent's to answer; warnings are lines."""
    forkserver.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def _run(experiment: Experiment, fresh: bool) -> tuple[str, bool]:
    """In a process of the pool: why a run failed, empty if it did not, and whether it was refused.

    Words travel and not the exception: one of the user's own classes may not come apart again in the parent.
    """
    try:
        run(experiment, resume=not fresh and is_stopped(experiment), fresh=fresh, quiet=True)
    except UserError as error:
        return str(error), True
    except (RuntimeError, OSError, MemoryError) as error:
        return in_one_line(error), False
    return "", False
