"""Checks of the parts that users write, once and before round 1: what is wrong with one is a single line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fl_sim.config.experiment import Experiment
from fl_sim.core.types import UserError

ELSEWHERE = ("workers", "ray")
"""Engines that run clients in other processes."""


def check(experiment: Experiment) -> None:
    """Complain of a part that cannot work, before anything is loaded or started.

    Raises:
        UserError: names the part, and what is allowed.
    """
    _importable(experiment)


def _importable(experiment: Experiment) -> None:
    if experiment.engine not in ELSEWHERE:
        return
    for key, text in _texts(experiment.model_dump(mode="json")):
        if text.startswith("__main__:"):
            where = f"{key.removesuffix('.target')} = {text!r}: engine = {experiment.engine!r}"
            why = "runs clients in other processes, which cannot see what the running script or notebook defines"
            raise UserError(f"{where} {why}; save it to a file mine.py and name it mine:{text.partition(':')[2]}")


def _texts(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{path}{key}.")
        elif isinstance(value, str):
            yield path + key, value
