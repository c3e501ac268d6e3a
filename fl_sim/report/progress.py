"""The live display of a run: bars on a terminal and in a notebook, one line per evaluated round on a pipe, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fl_sim.config.experiment import Experiment
from fl_sim.core.observer import Observer, Silent
from fl_sim.report.sizes import size
from fl_sim.training.tasks import Metric, learning_task

CELL_S = 0.5
"""Seconds between two versions of a notebook's output, at least."""
TIMES = len(" /  0:00:00 left 0:00:00 ")
"""Columns that a bar's numbers take beside its rounds."""


def _line(row: Mapping[str, float], measured: Mapping[str, float], metric: Metric) -> str:
    """One line of numbers; metric and savings are those of the last evaluated round, which is named if it is an earlier one."""
    row, number = {**measured, **row}, measured.get("round")
    earlier = f"(round {number:.0f})  " if number is not None and number != row["round"] else ""
    reached = row.get(metric.name)
    shown = "" if reached is None else f"{100 * reached:6.2f} %" if metric.percent else f"{reached:.4g}"
    accuracy = f"{metric.name} {shown}  {earlier}" if shown else ""
    saved = f"  saved {size(row['saved_bytes'])}" if row.get("saved_bytes", 0) > 0 else ""
    failures = f"  {row['failures']:.0f} failed" if row.get("failures") else ""
    return (
        f"{accuracy}up {size(row['uplink_bytes'])}  down {size(row['downlink_bytes'])}"
        f"{saved}  alive {100 * row['density']:.0f} %{failures}"
    )


@dataclass
class _Bar:
    progress: Progress
    rounds: TaskID
    answers: Progress
    clients: TaskID
    status: Text
    metric: Metric
    refresh: Callable[[], None] = lambda: None
    measured: dict[str, float] = field(default_factory=dict)

    def say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, soft_wrap=True)

    def reply(self, answered: int, cohort: int) -> None:
        self.answers.update(self.clients, completed=answered, total=cohort)
        self.refresh()

    def round(self, row: Mapping[str, float]) -> None:
        if self.metric.name in row:  # stays on the screen until the next evaluated round
            shown = ("round", self.metric.name, "saved_bytes")
            self.measured = {name: row[name] for name in shown if name in row}
        self.progress.update(self.rounds, completed=row["round"])
        self.answers.update(self.clients, completed=0)  # of the next round, none has answered
        self.status.plain = _line(row, self.measured, self.metric)
        self.refresh()


@dataclass
class _Lines:
    console: Console
    rounds: int
    metric: Metric
    title: str = ""

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def reply(self, answered: int, cohort: int) -> None:
        """Single clients are too many lines for a log."""

    def round(self, row: Mapping[str, float]) -> None:
        if self.metric.name in row:
            line = _line(row, row, self.metric)
            which = f"{self.title}  " if self.title else ""
            words = f"{which}round {row['round']:.0f}/{self.rounds}  {line}"
            self.console.print(words, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def display(experiment: Experiment, console: Console, *, quiet: bool, title: str = "") -> Iterator[Observer]:
    """The observer that fits the console.

    Args:
        experiment: the run.
        console: where it is shown.
        quiet: show nothing.
        title: which of several runs this one is; its bars vanish when it is over, for the caller then prints a line of it.
    """
    metric = learning_task(experiment.task).metric
    if quiet:
        yield Silent()
    elif not (console.is_terminal or console.is_jupyter):
        yield _Lines(console, experiment.rounds, metric, title)
    else:
        bar = _bar(experiment, console, metric)
        parts: list[RenderableType] = [Text(title, overflow="ellipsis", no_wrap=True)] if title else []
        parts += [bar.progress, bar.answers, bar.status]
        if console.is_jupyter:
            with _cell(parts) as bar.refresh:
                yield bar
                bar.answers.update(bar.clients, visible=False)
        else:
            with Live(Group(*parts), console=console, transient=bool(title)):
                yield bar
                bar.answers.update(bar.clients, visible=False)


def _bar(experiment: Experiment, console: Console, metric: Metric) -> _Bar:
    room = console.width - TIMES - 2 * len(str(experiment.rounds))
    width = max(4, min(20, room // 2))
    name = Text(experiment.name)
    name.truncate(max(len("clients"), room - width), overflow="ellipsis")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=width), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
    # Times of a cohort's answers say nothing, so that the clients have bars of their own.
    answers = Progress(*columns, console=console)
    rounds = progress.add_task(name.plain, total=experiment.rounds)
    clients = answers.add_task(f"{'clients':<{name.cell_len}}", total=experiment.cohort.size)
    # The numbers have a line of their own: beside the bars they would squeeze them out of 80 columns.
    return _Bar(progress, rounds, answers, clients, Text(), metric)


@contextmanager
def _cell(parts: Sequence[RenderableType]) -> Iterator[Callable[[], None]]:
    """Show the parts below a notebook's cell; what is yielded shows them anew, at most twice a second.

    rich's own `Live` needs ipywidgets there; replacing one output of IPython needs nothing that a notebook does not have.
    """
    from IPython.display import display

    shown = Padding(Group(*parts), 0)  # it has the representation that a notebook asks for; a group has none
    output, last = display(shown, display_id=True), time.monotonic()

    def refresh() -> None:
        nonlocal last
        if time.monotonic() - last >= CELL_S:
            output.update(shown)
            last = time.monotonic()

    try:
        yield refresh
    finally:
        output.update(shown)


def shown(experiment: Experiment, observer: Observer | None, *, quiet: bool | None) -> AbstractContextManager[Observer]:
    """The observer of a run that Python code started: the given one, or else a display on standard output.

    Args:
        experiment: the run.
        observer: of the caller; None = a display.
        quiet: show nothing; None = where standard output is neither a terminal nor a notebook.
    """
    console = Console()
    silent = not (console.is_terminal or console.is_jupyter) if quiet is None else quiet
    return nullcontext(observer) if observer is not None else display(experiment, console, quiet=silent)


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that shows a bar on a terminal from its first call on, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)
