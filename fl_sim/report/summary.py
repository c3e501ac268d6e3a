"""A finished run: the `Report` that holds its summary with rounds and ledger."""

from __future__ import annotations

import json
import math
import operator
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fl_sim.communication.ledger import Ledger
from fl_sim.config.toml import Json
from fl_sim.core.errors import in_one_line
from fl_sim.core.files import open_plain, read_plain
from fl_sim.core.types import Params, UserError
from fl_sim.report.flows import Flows
from fl_sim.report.rounds import Rounds
from fl_sim.report.schema import (
    Origin,
    Summary,
    check_counts,
    check_rows,
    origin_of,
    summary_of,
)
from fl_sim.report.sizes import size
from fl_sim.report.summary_numbers import moved

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

LINES = 1000
"""Of rounds.jsonl that are checked together."""
WRITTEN = (
    "name",
    "rounds",
    "client.target",
    "strategy.target",
    "data.source",
    "model.name",
    "cohort",
    "training",
    "wire.error_feedback",
)
"""Keys and tables of every config.toml. Without them the defaults, which are another experiment, would be taken for the run's."""


class Unfinished(UserError):
    """A run's folder without the results that a finished run leaves there."""


@dataclass(frozen=True, repr=False)
class Report:
    """A run's results.

    Attributes:
        folder: the run folder.
        summary: the content of `summary.json`.
        rounds: the lines of `rounds.jsonl`.
        ledger: every payload that moved.
        params: final global parameters; empty when loaded from a folder without them.
    """

    folder: Path
    summary: Mapping[str, Json]
    rounds: Sequence[Mapping[str, float]]
    ledger: Ledger
    params: Params

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read a finished run's folder.

        Raises:
            Unfinished: the folder holds no summary.json.
            UserError: there is no such folder, or a file of it is damaged.
        """
        folder = Path(folder)
        if folder.is_dir() and not (folder / "summary.json").exists():
            raise Unfinished(f"{folder}: not a finished run; there is no summary.json in it")
        try:
            summary = json.loads(read_plain(folder / "summary.json"))
            rounds = Rounds(_checked_rows(folder))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{folder}: not a finished run ({error.strerror}: {Path(error.filename).name})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{folder}: damaged run folder: {in_one_line(error)}") from error
        finished = summary_of(summary, folder).rounds
        if len(rounds) < finished:
            raise UserError(
                f"{folder}: damaged run folder: rounds.jsonl: {len(rounds)} rounds, of {finished} in summary.json"
            )
        return cls(folder, summary, rounds, Ledger.read(folder / "ledger.parquet"), {})

    @cached_property
    def results(self) -> Summary:
        """The summary with typed fields: `report.results.accuracy.final` is `report.summary["accuracy"]["final"]`.

        Raises:
            UserError: the summary is no summary of a run.
        """
        return summary_of(self.summary, self.folder)

    def __repr__(self) -> str:
        """One line; the content of `summary` alone is 3 kB."""
        try:
            r = self.results
        except UserError as error:
            return f"Report({error})"
        return (
            f"Report({self.folder}: {r.rounds} rounds, test {r.score.name} {r.score.told(r.score.final)}, "
            f"{size(r.uplink_bytes, 3)} up, {size(r.downlink_bytes, 3)} down, saving {100 * r.saving:.2f} %)"
        )

    def __rich__(self) -> Table:
        """Ten entries, for `rich.print` and a console of rich."""
        from rich.table import Table
        from rich.text import Text

        from fl_sim.report.explanation import COLUMN, explanation  # here: it is made of the numbers of this module

        shown = Table.grid()
        shown.add_column(no_wrap=True, min_width=COLUMN)
        shown.add_column(overflow="fold")
        for line in explanation(self):
            shown.add_row(Text(line[:COLUMN]), Text(line[COLUMN:]))
        return shown

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        from fl_sim.report.page import card  # here: it is made of the numbers of this module

        return card(self)

    def frame(self) -> pandas.DataFrame:
        """One row a round: the columns of rounds.jsonl after the run's name, id and seed, so that runs concatenate.

        Raises:
            UserError: pandas is not installed; it is an optional extra.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("Report.frame() needs pandas: pip install 'fl-sim[pandas]'") from error
        return pandas.DataFrame(
            [{**{key: self.summary[key] for key in ("name", "id", "seed")}, **r} for r in self.rounds]
        )

    @cached_property
    def columns(self) -> Rounds:
        """The rounds as columns."""
        return self.rounds if isinstance(self.rounds, Rounds) else Rounds(self.rounds)

    @cached_property
    def flows(self) -> Flows:
        """Sums of the ledger by part, and by client and round."""
        return Flows.of(self.ledger)

    @cached_property
    def config(self) -> Mapping[str, Json]:
        """The resolved config, as it was written.

        Raises:
            UserError: it cannot be read.
        """
        try:
            config = tomllib.loads(read_plain(self.folder / "config.toml").decode())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.folder}: damaged run folder: config.toml: {in_one_line(error)}") from error
        for key in WRITTEN:
            table, _, name = key.rpartition(".")
            if name not in (within if isinstance(within := config.get(table, {}) if table else config, dict) else {}):
                raise UserError(
                    f"{self.folder}: damaged run folder: config.toml: without {key}, which every run writes"
                )
        return config

    @cached_property
    def label_counts(self) -> Sequence[Sequence[int]]:
        """Training samples of each client (row) by class (column); empty where the run did not keep them."""
        counts = self._tree("partition.json")
        if counts is None:
            return []
        table = check_counts(counts, self.folder)
        self.require_clients(len(table))
        return table

    def require_clients(self, rows: int) -> None:
        """Refuse a partition.json of another number of clients than the run's. Raises UserError."""
        if rows != (clients := self.summary.get("num_clients", rows)):
            raise UserError(
                f"{self.folder}: damaged run folder: partition.json: {rows} clients, of {clients} in summary.json"
            )

    @cached_property
    def origin(self) -> Origin | None:
        """Hashes of the run's code and data; None where the run did not keep them."""
        tree = self._tree("identity.json")
        return None if tree is None else origin_of(tree, self.folder)

    def _tree(self, name: str) -> object | None:
        """Content of a JSON file of the run folder; None where there is no such file."""
        try:
            tree = cast(object, json.loads(read_plain(self.folder / name)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.folder}: damaged run folder: {name}: {in_one_line(error)}") from error
        if tree is None:  # which is no missing file
            raise UserError(f"{self.folder}: damaged run folder: {name}: null")
        return tree


def _checked_rows(folder: Path) -> Iterator[Mapping[str, float]]:
    """The lines of rounds.jsonl, of which some are in memory at a time."""
    with open_plain(folder / "rounds.jsonl") as stream:
        lines, before = iter(stream), 0
        while rows := [json.loads(line, object_hook=_numbers) for line in islice(lines, LINES)]:
            check_rows(rows, folder, before=before)
            before += len(rows)
            yield from rows


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    """A line of rounds.jsonl as it was: null stands for a number that was not finite."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def bytes_of_run(report: Report, target: float) -> int | None:
    """`bytes_to` of a run's rounds and its task's metric."""
    score = report.results.score
    reached = partial(operator.le, target) if score.higher else partial(operator.ge, target)
    row = report.columns.first(score.name, reached)
    return None if row is None else moved(row)
