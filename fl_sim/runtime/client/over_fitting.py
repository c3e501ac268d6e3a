"""Over-fitting, measured on the clients: a trained model on samples it was trained on, beside test samples of their kind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import Metrics
from fl_sim.data import Split
from fl_sim.training.evaluation import evaluate
from fl_sim.training.tasks import CLASSIFICATION, LearningTask

MeasureFit = Callable[[int, int, nn.Module], Metrics]
"""(round, partition, the model that the client has just trained) -> further metrics of the update."""


Settle = Callable[[nn.Module, Split], object]
"""Gives a model BatchNorm statistics from samples, in place, where it has none that fit its weights."""


def no_measurement(number: int, partition: int, model: nn.Module) -> Metrics:
    """Measure nothing."""
    return {}


def keep_statistics(model: nn.Module, data: Split) -> None:
    """The model has the statistics of its training."""


@dataclass(frozen=True)
class OwnFit:
    """Loss and metrics of a client's trained model on its own samples, `seen`, and on its share of the test set, `unseen`.

    Attributes:
        seen, unseen: partition -> its training samples; test samples in the proportions of its labels.
        samples: of either, a fixed draw, not augmented.
        seed: of the draw.
        every, rounds: measured every so many rounds, and in the last.
        setting: round -> what holds while measuring: how many channels a gated model keeps.
        settle: gives the model BatchNorm statistics from its own samples, where it has none of its own.
        precision: see `fl_sim.training.precision`.
        learning: the task whose metrics are measured.
    """

    seen: Callable[[int], Split]
    unseen: Callable[[int], Split]
    samples: int
    seed: int
    every: int
    rounds: int
    setting: Callable[[int], AbstractContextManager[object]]
    settle: Settle
    precision: str
    learning: LearningTask = CLASSIFICATION

    def __call__(self, number: int, partition: int, model: nn.Module) -> Metrics:
        """See `MeasureFit`."""
        if number % self.every and number != self.rounds:
            return {}
        seen, unseen = self._drawn(self.seen, partition), self._drawn(self.unseen, partition)
        metrics: Metrics = {}
        with self.setting(number):
            self.settle(model, seen)
            for kind, split in (("seen", seen), ("unseen", unseen)):
                found = evaluate(model, split, self.learning, precision=self.precision)
                metrics |= {f"{kind}_{name}": value for name, value in found.items() if name != "examples"}
        return metrics

    def _drawn(self, split_of: Callable[[int], Split], partition: int) -> Split:
        split, rng = split_of(partition), numpy_generator(self.seed, partition, 0, Purpose.EVALUATION)
        return split.augmented(None).subset(rng.permutation(len(split))[: self.samples])
