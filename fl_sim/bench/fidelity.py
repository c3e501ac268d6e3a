"""Fidelity of a student to its teacher, and Welch's t-test for a difference of means.

The first two take logits (N, K) of the same N samples, in evaluation mode.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Share of samples, 0..1, on which both prefer the same class, right or wrong (Stanton et al., 2021)."""
    return float((student.argmax(dim=1) == teacher.argmax(dim=1)).double().mean())


def divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> float:
    """Mean over samples of KL(softmax(z_t/T) || softmax(z_s/T)), in nats; without the loss's factor T^2."""
    own, wanted = (functional.log_softmax(logits.double() / temperature, dim=1) for logits in (student, teacher))
    return float(functional.kl_div(own, wanted, reduction="batchmean", log_target=True))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample standard deviation); the deviation of fewer than two values is NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def welch(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of Welch's t-test (1947) that two samples have one mean; NaN where a sample has fewer than two values.

    Two samples without any spread have p = 1 when they are equal and 0 otherwise.
    """
    if min(len(first), len(second)) < 2:
        return math.nan
    if len(set(first)) == len(set(second)) == 1:
        return float(first[0] == second[0])
    # scipy.stats takes half a second to import, and few commands need it.
    from scipy.stats import ttest_ind

    return float(ttest_ind(first, second, equal_var=False).pvalue)
