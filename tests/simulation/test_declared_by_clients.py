"""What a client declares of itself reaches the checks before round 1, whatever stands around it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from federation import tiny

from clients.attacks import Attacked, Attackers, sign_flip
from clients.local import LocalClient, TopK
from clients.personal import Ditto
from clients.retention import FollowGap
from fl_sim import ClientContext, Task, Update
from fl_sim.communication.extra import Extra
from fl_sim.core.types import UserError
from fl_sim.data.partition import Labels, Request
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.parts import check_built
from fl_sim.training.client import DECLARED, NOTHING
from fl_sim.training.loop import Training

INNER = LocalClient(Training(), upload=TopK(0.1), extra=Extra(up={"count": {"count": (1,)}}))
AROUND: Mapping[str, object] = {
    "attacked": Attacked(INNER, sign_flip, Attackers((0,), 3, 6)),
    "ditto": Ditto(INNER, Training(), 0.1),
    "gap": FollowGap(INNER),
}
OWN = {"ditto": {"keeps", "before_evaluation"}, "gap": {"trained_on"}}
"""What the outer client declares by itself."""
CODEC = ("wire.codec.uplink=powersgd", "wire.uplink.content=difference")
GATED = ("gating.keep=0.5", "client=clients.presets:gap_pruning", "data.min_size=1")


def chooses(task: Task, ctx: ClientContext, share: float = 0.5) -> Update:
    raise NotImplementedError


def of_sizes(labels: Labels, request: Request) -> list[Labels]:
    """Five clients of some samples each, and one with the rest."""
    return np.split(np.arange(len(labels)), np.arange(1, request.num_clients) * SAMPLES["each"])


SAMPLES = {"each": 1}


@pytest.fixture(autouse=True)
def _mine(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("declared_by_clients")
    vars(mine).update(chooses=chooses, of_sizes=of_sizes)
    monkeypatch.setitem(sys.modules, mine.__name__, mine)
    monkeypatch.setattr(chooses, "sends_all", False, raising=False)


@pytest.mark.parametrize("outer", AROUND)
def test_a_client_around_another_declares_what_that_does(outer: str) -> None:
    for name in DECLARED - OWN.get(outer, set()):
        assert getattr(AROUND[outer], name, "nothing") == getattr(INNER, name, "nothing")
    assert not hasattr(AROUND[outer], "plain_training")  # they are no batch of plain local training
    assert Ditto.keeps == NOTHING


@pytest.mark.parametrize(
    "options",
    [
        ("client=clients.presets:topk", "attack.kind=sign_flip"),
        GATED,
        ("client=declared_by_clients:chooses",),
        ("client.target=declared_by_clients:chooses", "client.share=0.3"),
    ],
    ids=["attacked", "gap", "function", "function with an option"],
)
def test_a_codec_of_whole_tensors_is_refused_beside_a_client_that_chooses(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=r"codes whole tensors, and client = '.*' chooses what it sends"):
        check_built(Federation.build(tiny(tmp_path, *CODEC, *options)))


@pytest.mark.parametrize("attack", [(), ("attack.kind=sign_flip", "attack.share=0.2")])
def test_a_client_that_holds_all_its_samples_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: tuple[str, ...]
) -> None:
    own = (*GATED, *attack, "data.partition=declared_by_clients:of_sizes")
    with pytest.raises(UserError, match=r"gap_pruning': holds samples out, and 5 of 6 clients have none left .* = 2$"):
        check_built(Federation.build(tiny(tmp_path, *own)))
    monkeypatch.setitem(SAMPLES, "each", 2)
    check_built(Federation.build(tiny(tmp_path, *own)))
