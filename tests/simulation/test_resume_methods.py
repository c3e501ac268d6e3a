"""Methods that keep something between rounds, killed in the middle: the resumed run is the one that nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from federation import same
from interruption import KillAfter, Killed
from softmax_federation import experiment

from fl_sim import Report, run
from fl_sim.simulation import resume

METHODS = {
    "scaffold": ("client=clients.presets:scaffold", "strategy=strategies.presets:scaffold"),
    "feddyn": ("client=clients.presets:feddyn", "strategy=strategies.presets:feddyn"),
    "fednova": ("client=clients.presets:fednova", "strategy=strategies.presets:fednova", "training.batch_size=8"),
    "qfedavg": ("client=clients.presets:qfedavg", "strategy=strategies.presets:qfedavg"),
    "moon": ("client=clients.presets:moon", "model.name=mlp", "model.width=0.1"),
    "power_of_choice": ("strategy=strategies.presets:power_of_choice", "strategy.candidates=4"),
    "fedavgm": ("strategy=strategies.presets:fedavgm",),
    "fedadam": ("strategy=strategies.presets:fedadam",),
    "fedyogi": ("strategy=strategies.presets:fedyogi",),
    "fedadagrad": ("strategy=strategies.presets:fedadagrad",),
}
ROUNDS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """A method's run that nothing disturbed."""
    return cache(lambda method: run(experiment(tmp_path_factory.mktemp(method), *METHODS[method]), quiet=True))


def check(method: str, after: int, replies: int, out: Path, whole: Report) -> None:
    with pytest.raises(Killed):
        run(experiment(out, *METHODS[method]), KillAfter(after, replies))
    same(whole, resume(experiment(out, *METHODS[method]), quiet=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_killed_once_resumes_bit_for_bit(
    method: str, whole: Callable[[str], Report], tmp_path: Path
) -> None:
    after, replies = np.random.default_rng(list(method.encode())).integers((1, 0), (ROUNDS, 3)).tolist()
    check(method, after, replies, tmp_path, whole(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_resumes_bit_for_bit_after_each_of_20_kills(
    method: str, whole: Callable[[str], Report], tmp_path: Path
) -> None:
    rng = np.random.default_rng(list(method.encode()))
    for number, (after, replies) in enumerate(rng.integers((0, 0), (ROUNDS, 3), size=(20, 2)).tolist()):
        check(method, after, replies or int(after == 0), tmp_path / str(number), whole(method))
