"""Methods that keep something between rounds, killed in the middle: the resumed run is the one that nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from federation import same
from interruption import KillAfter, Killed
from softmax_federation import experiment

from fl_sim import Report, run
from fl_sim.simulation import resume

CHANGES = "wire.uplink.content=difference"
MLP = ("model.name=mlp", "model.width=0.1")
FEDBUFF = ("schedule.kind=fedbuff", "schedule.buffer=2", "network.links={3G=1, 4G=1}", "network.speed_spread=2")
OWN = "test_own_codecs:Draws"
"""A codec that keeps how often it was asked, and sends that."""
DIGITS = (
    "model.name=cnn_bn",
    "data={source='digits', clients=4}",
    "cohort.size=2",
    "training={lr=0.1, steps=2, batch_size=16}",
)
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
    "fedluar": (
        "client=strategies.published.fedluar:client",
        "strategy={target='strategies.published.fedluar:server', recycled=1}",
        *MLP,
    ),
    "Flower's FedAdam": ("strategy=flwr.serverapp.strategy:FedAdam",),
    "ditto": ("client=clients.presets:ditto", "evaluate.clients=2"),
    "a head of each client's own": (
        "client=clients.presets:fedrep",
        "model.personal=head",
        "evaluate.clients=2",
        *MLP,
    ),
    "error feedback": ("client=clients.presets:topk", "client.density=0.3", "wire.error_feedback=true", CHANGES),
    "sparse broadcast": ("wire.broadcast={density=0.3, values='int8'}", *MLP),
    "sparse broadcast to clients that fail": (
        "wire.broadcast.density=0.3",
        "network={links={4G=1}, dropout=0.4}",
        "rounds=6",
        *MLP,
    ),
    "codec of the uplink": ("wire.codec.uplink=powersgd", "wire.error_feedback=true", CHANGES),
    "codec of the downlink": (f"wire.codec.downlink={OWN}", "evaluate.clients=2"),
    "codecs both ways": (
        f"wire.codec={{uplink='{OWN}', downlink='powersgd'}}",
        "wire.broadcast.density=1.0",
        "wire.error_feedback=true",
        CHANGES,
        *MLP,
    ),
    "fedbuff": (*FEDBUFF, "strategy=strategies.presets:fedavgm", "wire.broadcast.density=0.5", *MLP),
    "scaffold under fedbuff": (*FEDBUFF, "client=clients.presets:scaffold", "strategy=strategies.presets:scaffold"),
}
SLOWER = {
    "an over-fitting client's keep ratio": ("client=clients.presets:gap_pruning", "gating.keep=0.5", *DIGITS),
    "a keep ratio drawn once": (
        "client={target='clients.presets:adaptive_pruning', profile=[0.5, 1.0]}",
        "gating.keep=0.5",
        *DIGITS,
    ),
    "projections of a teacher": ("client=clients.presets:feature_distillation", "client.stages=['3']", *DIGITS),
    "BatchNorm of each client's own": (
        "client=clients.presets:fedbn",
        "model={name='cnn_bn', statistics='local', personal='batchnorm'}",
        "evaluate.clients=2",
        *DIGITS[1:],
    ),
}
ALL = {**METHODS, **SLOWER}
ROUNDS = 4


@pytest.fixture(autouse=True, scope="module")
def _importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """A method's run that nothing disturbed."""
    return cache(lambda method: run(experiment(tmp_path_factory.mktemp("whole"), *ALL[method]), quiet=True))


def check(method: str, after: int, replies: int, out: Path, whole: Report) -> None:
    with pytest.raises(Killed):
        run(experiment(out, *ALL[method]), KillAfter(after, replies))
    same(whole, resume(experiment(out, *ALL[method]), quiet=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_killed_once_resumes_bit_for_bit(
    method: str, whole: Callable[[str], Report], tmp_path: Path
) -> None:
    after, replies = np.random.default_rng(list(method.encode())).integers((1, 0), (ROUNDS, 3)).tolist()
    check(method, after, replies, tmp_path, whole(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL)
def test_a_method_resumes_bit_for_bit_after_each_of_20_kills(
    method: str, whole: Callable[[str], Report], tmp_path: Path
) -> None:
    rng = np.random.default_rng(list(method.encode()))
    for number, (after, replies) in enumerate(rng.integers((0, 0), (ROUNDS, 3), size=(20, 2)).tolist()):
        check(method, after, replies or int(after == 0), tmp_path / str(number), whole(method))
