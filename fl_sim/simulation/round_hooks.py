"""Hooks of the round loop: callables after each round that complete, write or save the round's row.

A row is one line of rounds.jsonl, by column. Hooks run in order, and later ones see what earlier ones added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from flwr.serverapp import Grid

from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.core.files import as_json, create
from fl_sim.core.process_state import seeded
from fl_sim.core.seeding import Purpose, derive
from fl_sim.report import against_dense
from fl_sim.runtime.grids.pool import PooledGrid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.model_facts import DensePayloads
from fl_sim.simulation.server import Server
from fl_sim.sparsity import density, layer_densities
from fl_sim.training.evaluation import evaluate

Row = dict[str, float]
"""One line of rounds.jsonl, by column."""


class Hook(Protocol):
    """Something that happens after each round."""

    def round(self, row: Row) -> None:
        """A round is over; a hook may add columns to its row."""


def client_options(experiment: Experiment) -> dict[str, bool | int | float | str]:
    """Options of a plain client function, which travel in `task.config`; presets took theirs when they were built."""
    return {k: v for k, v in experiment.client.options.items() if isinstance(v, (bool, int, float, str))}


def round_row(number: int, seconds: float, server: Server, ledger: Ledger) -> Row:
    """Start the row of a round: training metrics, bytes sent so far, densities; an evaluation's columns follow these."""
    mask = server.models[0].mask
    layers = {f"density/{name}": round(share, 4) for name, share in layer_densities(mask or {}).items()}
    return {
        "round": number,
        "seconds": round(seconds, 4),
        **server.metrics,
        "uplink_bytes": ledger.sent["up"],
        "downlink_bytes": ledger.sent["down"],
        "density": 1.0 if mask is None else density(mask),
        **layers,
    }


def is_evaluated(number: int, experiment: Experiment) -> bool:
    """Whether the run evaluates after a round: it is due, or the last."""
    return number % experiment.evaluate.every == 0 or number == experiment.rounds


def before_evaluation(row: Row) -> Row:
    """The columns that `round_row` gave a row, of which the densities are the last."""
    names = list(row)
    last = max(at for at, name in enumerate(names) if name == "density" or name.startswith("density/"))
    return {name: row[name] for name in names[: last + 1]}


def leave_out_undue(rows: list[Row], experiment: Experiment) -> list[int]:
    """Take from rows, in place, evaluations that the run does not make: of rounds that were the last of a shorter run.

    Returns:
        The rounds of these rows.
    """
    found = []
    for at, row in enumerate(rows):
        bare = before_evaluation(row)
        if bare.keys() != row.keys() and not is_evaluated(int(row["round"]), experiment):
            rows[at] = bare
            found.append(int(row["round"]))
    return found


class Folded:
    """Says once, after the first round in which workers added up updates, how many they were."""

    def __init__(self, grid: Grid, say: Callable[[str], None]) -> None:
        self._grid, self._say, self._said = grid, say, False

    def round(self, row: Row) -> None:
        """See `Hook`."""
        if not self._said and isinstance(self._grid, PooledGrid) and self._grid.traffic.folded:
            self._said = True
            self._say(f"round {row['round']}: {self._grid.traffic.told()}")


class Evaluation:
    """Measures every model on the test set, and on the validation set, which alone may choose anything.

    Adds the task's metrics, the loss and the bytes saved so far to the row of each round that is evaluated. With personal
    parts the metrics are the means over the clients that evaluated.
    """

    def __init__(self, federation: Federation, server: Server, ledger: Ledger, dense: DensePayloads) -> None:
        self.federation, self.server, self.ledger, self.dense = federation, server, ledger, dense
        self._weighed = self._saved = 0

    def round(self, row: Row) -> None:
        """See `Hook`."""
        if is_evaluated(int(row["round"]), self.federation.experiment):
            self.complete(row)

    def complete(self, row: Row) -> None:
        """Measure, and complete the row of the last round that was run."""
        number, experiment = int(row["round"]), self.federation.experiment
        row |= self._measure(number) if experiment.model.personal is None else self._of_clients(row)
        dense, moved = against_dense(self.ledger, self.dense.first, self.dense.others, start=self._weighed)
        self._weighed, self._saved = len(self.ledger), self._saved + dense - moved
        row["saved_bytes"] = self._saved

    def _of_clients(self, row: Row) -> Row:
        """The metrics of the clients that evaluated: the server has no trained personal parts to measure.

        Raises:
            RuntimeError: no client evaluated.
        """
        learning = self.federation.experiment.learning
        metric = learning.metric.name
        if f"clients_{metric}" not in row:
            raise RuntimeError(f"round {row['round']:.0f}: no client evaluated its own model (evaluate.clients)")
        further = [name for name in learning.further if f"clients_{name}" in row]
        return {name: row[f"clients_{name}"] for name in (metric, "loss", *further)}

    def _measure(self, number: int) -> Row:
        row: Row = {}
        learning = self.federation.experiment.learning
        for position, (track, model) in enumerate(zip(self.federation.tracks, self.server.models, strict=True)):
            section, chosen = track.experiment.evaluate, track.experiment.training.precision
            splits = {"": track.data.test, "validation_": track.data.validation}
            splits = {prefix: split for prefix, split in splits.items() if len(split)}  # data.validation = 0
            suffix = f"/{track.label}" if position else ""
            track.built.put_back()
            with track.as_in(number), seeded(derive(track.experiment.seed, number, Purpose.EVALUATION)):
                completed = track.complete(model.params)
                for prefix, split in splits.items():
                    there = split.to(track.device)
                    found = evaluate(completed, there, learning, batch_size=section.batch_size, precision=chosen)
                    row |= {f"{prefix}{name}{suffix}": value for name, value in found.items() if name != "examples"}
        return row


class RoundsFile:
    """Appends each row to `rows` and to rounds.jsonl; a context manager that writes the rows so far when it starts."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.rows, self._file = rows, create(folder / "rounds.jsonl")

    def __enter__(self) -> Self:
        self._file.__enter__()
        for row in self.rows:
            self._write(row)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def round(self, row: Row) -> None:
        """See `Hook`."""
        self.rows.append(row)
        self._write(row)

    def rewrite(self) -> None:
        """Write the file again: the last row was completed."""
        self._file.seek(0)
        self._file.truncate()
        for row in self.rows:
            self._write(row)

    def _write(self, row: Mapping[str, float]) -> None:
        self._file.write((as_json(row) + "\n").encode())
        self._file.flush()
