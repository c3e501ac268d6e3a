"""Methods, codecs, adapters, attackers, schedules and personal parts together: the same bits on every engine, and after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
from federation import TINY, same
from interruption import KillAfter, Killed

from fl_sim import Experiment, Report, run

GATED = (
    "model.name=resnet8",
    "model.width=0.25",
    "client.target=clients.presets:adaptive_pruning",
    "gating.salience=weight",
)
PRUNED = ("strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2")
INT8 = ("wire.uplink.values=int8", "wire.uplink.content=difference")
TERNARY = ("wire.uplink.values=top10-ternary", "wire.uplink.content=difference", "wire.error_feedback=true")
DELTA = ("wire.uplink.values=float32-delta", "wire.broadcast.density=1.0", "wire.broadcast.values=float32-delta")
LORA = ("model.name=mlp", 'model.adapter={rank = 2, train = "head"}')
BUFFERED = ("schedule.kind=fedbuff", "schedule.buffer=3", "network.links.4G=1", "network.links.3G=1")


def method(name: str) -> tuple[str, str]:
    """A client and a strategy of the same name."""
    return f"client.target=clients.presets:{name}", f"strategy.target=strategies.presets:{name}"


PARTS: Mapping[str, Sequence[str]] = {
    "cut channels, int8": (*GATED, "training.cut_channels=true", *INT8),
    "cut channels under a mask": (*PRUNED, "training.cut_channels=true", "wire.uplink.masks=smallest"),
    "delta both ways": DELTA,
    "delta, pruned": (*DELTA, *PRUNED),
    "ternary, momentum, decay": (*TERNARY, "training.momentum=0.9", "training.decay=cosine", "training.warmup=1"),
    "SCAFFOLD, int8": (*method("scaffold"), *INT8),
    "SCAFFOLD, pruned weights of classes": (
        *method("scaffold"),
        "data.class_weights=balanced",
        "training.drop_last=true",
    ),
    "FedDyn, attacked": (*method("feddyn"), "attack.kind=alie", "attack.share=0.3"),
    "MOON, LoRA": (*LORA, "client.target=clients.presets:moon"),
    "LoRA, int8, accumulated": (*LORA, *INT8, "training.accumulate=2"),
    "Ditto": ("client.target=clients.presets:ditto", "evaluate.clients=3"),
    "FedRep, ternary": ("client.target=clients.presets:fedrep", "model.personal=head", "evaluate.clients=3", *TERNARY),
    "Krum, sign flips, stop": (
        "strategy.aggregate=krum",
        "attack.kind=sign_flip",
        "attack.share=0.2",
        "stop.patience=9",
    ),
    "FedBuff, pruned, int8": (*BUFFERED, *PRUNED, *INT8),
    "FedBuff, attacked, feedback": (*BUFFERED, *TERNARY, "attack.kind=gaussian", "attack.share=0.3"),
    "FedAdam of Flower": ("strategy.target=flwr.serverapp.strategy:FedAdam", "client.target=clients.presets:fedavg"),
}
Way = Callable[[str, Path], Report]


def together(parts: str, out: Path, *overrides: str) -> Experiment:
    """Three short rounds."""
    return Experiment.from_tree(TINY, ["rounds=3", "training.steps=2", *PARTS[parts], f'out="{out}"', *overrides])


def killed_and_resumed(parts: str, out: Path) -> Report:
    experiment = together(parts, out)
    with pytest.raises(Killed):
        run(experiment, KillAfter(1, replies=1))
    return run(experiment, resume=True)


def on(*engine: str) -> Way:
    return lambda parts, out: run(together(parts, out, *engine))


WAYS: Mapping[str, Way] = {
    "one worker": on("engine=workers", "workers.count=1"),
    "three workers": on("engine=workers", "workers.count=3"),
    "ray": on("engine=ray", "ray.workers=2"),
    "killed and resumed": killed_and_resumed,
}


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    return cache(lambda parts: run(together(parts, tmp_path_factory.mktemp("inline"))))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", PARTS)
def test_parts_together_end_in_the_same_bits(
    parts: str, way: str, tmp_path: Path, inline: Callable[[str], Report]
) -> None:
    assert not any(inline(parts).summary["failures"][kind] for kind in ("raised", "rejected", "lost"))
    same(inline(parts), WAYS[way](parts, tmp_path))
