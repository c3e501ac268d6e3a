"""Further metrics of a task, by scikit-learn, from all outputs of an evaluation: AUC, top-5 accuracy, macro F1.

learning = with_further(learning_task("classification"), ("auc", "top5"))
evaluate(model, data, learning)                    # {"loss": ..., "accuracy": ..., "auc": ..., "top5": ..., ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.types import UserError
from fl_sim.data.kinds import Targets
from fl_sim.training.tasks import LearningTask

Array = NDArray[np.generic]
TOP = 5


@dataclass(frozen=True)
class Further:
    """A metric that needs all outputs at once.

    Attributes:
        summary: one line for the documents.
        of: (outputs (N, K), targets (N,) or (N, K)) -> value; None where the samples do not define it.
        targets: kinds of targets that it is for.
        least: fewest outputs K for which it says anything.
    """

    summary: str
    of: Callable[[NDArray[np.float32], Array], float | None]
    targets: tuple[Targets, ...]
    least: int = 1


def _auc(outputs: NDArray[np.float32], targets: Array) -> float | None:
    """Mean over the classes, or labels, of which the samples hold both positive and negative ones."""
    from sklearn.metrics import roc_auc_score  # here: most runs need none of it

    if targets.ndim == 1 and outputs.shape[1] == 2:
        outputs, positive = outputs[:, 1:] - outputs[:, :1], (targets == 1)[:, None]
    elif targets.ndim == 1:
        shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        outputs = shifted / shifted.sum(axis=1, keepdims=True)
        positive = targets[:, None] == np.arange(outputs.shape[1])
    else:
        positive = targets.astype(bool)
    known = np.flatnonzero(positive.any(axis=0) & ~positive.all(axis=0))
    each = [float(roc_auc_score(positive[:, k], outputs[:, k])) for k in known]
    return sum(each) / len(each) if each else None


def _top(outputs: NDArray[np.float32], targets: Array) -> float:
    from sklearn.metrics import top_k_accuracy_score

    return float(top_k_accuracy_score(targets, outputs, k=TOP, labels=np.arange(outputs.shape[1])))


def _macro_f1(outputs: NDArray[np.float32], targets: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(targets, outputs.argmax(axis=1), average="macro", zero_division=0))


FURTHER: Mapping[str, Further] = {
    "auc": Further(
        "Area under the ROC curve: of the second class, or the mean over classes (one against the rest) or labels.",
        _auc,
        (Targets.CLASSES, Targets.LABELS),
    ),
    "top5": Further(
        "Share of samples, or tokens, whose class is among the five highest outputs.",
        _top,
        (Targets.CLASSES, Targets.TOKENS),
        TOP + 1,
    ),
    "f1": Further(
        "Mean of the classes' F1 (macro) over classes that occur or are predicted.", _macro_f1, (Targets.CLASSES,)
    ),
}


def with_further(task: LearningTask, names: Sequence[str]) -> LearningTask:
    """The task, measured by further metrics too.

    Raises:
        UserError: no such metric, or not of such targets.
    """
    for name in names:
        allowed = [each for each, metric in FURTHER.items() if task.targets in metric.targets]
        if name not in allowed:
            raise UserError(
                f"evaluate.metrics: {name!r}: allowed for targets that are {task.targets.value}: {', '.join(allowed) or 'none'}"
            )
    return replace(task, further={name: FURTHER[name].of for name in names}) if names else task


def require_outputs(names: Sequence[str], outputs: int) -> None:
    """Complain of a metric that says nothing of so few classes. Raises UserError."""
    for name in names:
        if outputs < (least := FURTHER[name].least):
            raise UserError(
                f"evaluate.metrics: {name!r}: {outputs} classes; needed: at least {least}, else it is always 1"
            )
