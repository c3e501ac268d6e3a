"""Learning rate over rounds: linear warm-up, then decay by the forms of `fl_sim.core.schedules`.

factor = rate_over_rounds("cosine", warmup=5, end=100, to=0.01)
factor(1), factor(6), factor(100)                                # 1/6, 1.0, 0.01
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fl_sim.core.schedules import Constant, Cosine, Cubic, Exponential, Linear, Schedule


def _constant(start: int, end: int, to: float) -> Schedule:
    return Constant(1.0)


def _cosine(start: int, end: int, to: float) -> Schedule:
    wave = Cosine(1.0, max(1, end - start))
    return lambda number: to + (1 - to) * wave(number - start)


DECAYS: Mapping[str, Callable[[int, int, float], Schedule]] = {
    "constant": _constant,
    "linear": Linear,
    "cubic": Cubic,
    "exponential": Exponential,
    "cosine": _cosine,
}
"""Form -> (last round at the full rate, first round at the last rate, last rate as a share of the first) -> round -> share."""


def rate_over_rounds(form: str, *, warmup: int, end: int, to: float) -> Schedule:
    """Round, from 1 -> factor of the learning rate: round r of a warm-up has r / (warmup + 1), then it falls from 1 to `to`.

    Args:
        form: a name of `DECAYS`.
        warmup: number of rounds below the full rate at the start.
        end: first round at the last rate.
        to: the last rate as a share of the first, above 0 and at most 1.
    """
    first = warmup + 1
    decay = DECAYS[form](first, max(first, end), to)
    return lambda number: number / first if number < first else decay(number)
