"""When a run ends before its last round: `Stopping` by what its rounds show, `ByteBudget` by what the next one would move."""

from __future__ import annotations

import math
from collections.abc import Callable

from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import MaskRecorder
from fl_sim.config.experiment import Experiment
from fl_sim.config.stop import Stop
from fl_sim.core.types import UserError
from fl_sim.simulation.round_hooks import Row
from fl_sim.simulation.server import Server
from fl_sim.training.tasks import Metric


class Stopping:
    """Hook that reads each round's row and says whether the run ends with it. A function of the rows alone, so that a run
    that is resumed ends where it would have.

    Metrics are those of the validation set, which alone may choose anything: of the test set only where there is no
    validation set, and of the clients that evaluated where the model has personal parts.

    Attributes:
        reason: why the run ends, in one line; None while it goes on.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.reason: str | None = None
        self._stop, learning = experiment.stop, experiment.learning
        self._measures, self._metric = learning.measures, learning.metric
        own = experiment.model.personal is not None
        self._prefix = "validation_" if experiment.data.validation and not own else ""
        self._place = "clients' " if own else self._prefix.replace("_", " ") or "test "
        self._best, self._since = -math.inf, 0

    def round(self, row: Row) -> None:
        """See `Hook`."""
        if self._stop is None or self.reason is not None:
            return
        found = self._time(self._stop, row) or self._good(self._stop, row) or self._patience(self._stop, row)
        if found is not None:
            self.reason = f"after round {row['round']:.0f}: {found}"

    def _time(self, stop: Stop, row: Row) -> str | None:
        now = row.get("simulated_s", 0.0)
        reached = stop.seconds is not None and now >= stop.seconds
        return f"{now:.1f} s on the virtual clock, stop.seconds = {stop.seconds:g}" if reached else None

    def _good(self, stop: Stop, row: Row) -> str | None:
        for name, target in stop.targets.items():
            if name in self._measures and (value := self._value(row, self._measures[name])) is not None:
                reached = value >= target if self._measures[name].higher else value <= target
                if reached:
                    return f"{self._place}{name} {value:.4g}, stop.{name} = {target:g}"
        return None

    def _patience(self, stop: Stop, row: Row) -> str | None:
        value = self._value(row, self._metric)
        if stop.patience is None or value is None:
            return None
        score = value if self._metric.higher else -value
        better = score > self._best  # not a number is no better than anything
        self._best, self._since = (score, 0) if better else (self._best, self._since + 1)
        if self._since < stop.patience:
            return None
        return (
            f"no better {self._place}{self._metric.name} in {self._since} evaluations, stop.patience = {stop.patience}"
        )

    def _value(self, row: Row, metric: Metric) -> float | None:
        return row.get(f"{self._prefix}{metric.name}")


class ByteBudget:
    """The most bytes that a run may move, `stop.mb`: a round that would exceed it is not part of the run.

    What a round moves is known exactly, because it is computed first: a round that would exceed the budget is undone, as if
    it had not been started. Ledger, masks and models are those of the round before. A bound that is known without computing
    the round would have to be that of dense messages, and would end a run of sparse ones long before its budget is used.
    """

    def __init__(self, experiment: Experiment, server: Server, ledger: Ledger, recorder: MaskRecorder | None) -> None:
        mb = None if experiment.stop is None else experiment.stop.mb
        self.limit = None if mb is None else int(mb * 1e6)
        self._server, self._ledger, self._recorder = server, ledger, recorder

    def fits(self, number: int, play: Callable[[], None]) -> str | None:
        """Play round `number`. Returns why it is not part of the run, in one line; None where it is.

        Raises:
            UserError: the first round would exceed the budget.
        """
        if self.limit is None:
            play()
            return None
        before, rows = [model.saved() for model in self._server.models], len(self._ledger)
        masks = 0 if self._recorder is None else len(self._recorder.rows)
        play()
        moved = sum(self._ledger.sent.values())
        if moved <= self.limit:
            return None
        for model, saved in zip(self._server.models, before, strict=True):
            model.restore(saved)
        self._ledger.cut(rows)
        if self._recorder is not None:
            del self._recorder.rows[masks:]
        budget = f"stop.mb = {self.limit / 1e6:g}"
        if number == 1:
            raise UserError(f"{budget}: the first round alone would move {moved / 1e6:.3f} MB")
        return f"after round {number - 1}: round {number} would have made it {moved / 1e6:.3f} MB, {budget}"
