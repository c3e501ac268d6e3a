"""Updates to an old model, moved to the current one, against the papers' formulas written out."""

from __future__ import annotations

import pytest
import torch

from fl_sim.codecs import Schema
from fl_sim.communication.schedule import Schedule
from fl_sim.core.types import Mask, Params, Update
from strategies.aggregation import EqualWeights
from strategies.robust import ClipNorm
from strategies.server_step import ServerState
from strategies.staleness import Refresh, clip_of, same_mask

SHAPES = {"w": (3, 4), "mean": (4,)}
SCHEMA = Schema.of({n: torch.zeros(s) for n, s in SHAPES.items()}, ["w"], buffers=["mean"])


def drawn(seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def moved(kind: str, stale: int, **options: float) -> tuple[Params, Params, Params, Params]:
    """(result, client's parameters y, base b, current model x)."""
    y, b, x = drawn(1), drawn(2), drawn(3)
    schedule = Schedule(kind=kind, **options)  # type: ignore[arg-type]
    refresh = Refresh(schedule, SCHEMA)
    return refresh(Update(y, 5), ServerState(SCHEMA, b), ServerState(SCHEMA, x), stale).params, y, b, x


@pytest.mark.parametrize("stale", [0, 3])
def test_fedasync_mixes_the_clients_model_into_the_current_one(stale: int) -> None:
    found, y, _, x = moved("fedasync", stale, mixing=0.6, exponent=0.5)
    weight = 0.6 * (1 + stale) ** -0.5
    for name in SHAPES:
        torch.testing.assert_close(found[name], (1 - weight) * x[name] + weight * y[name])


@pytest.mark.parametrize("kind", ["fedbuff", "deadline"])
def test_fedbuff_adds_the_weighted_change_and_mixes_statistics(kind: str) -> None:
    found, y, b, x = moved(kind, 3, exponent=0.5)
    torch.testing.assert_close(found["w"], x["w"] + (y["w"] - b["w"]) / 2)
    torch.testing.assert_close(found["mean"], (x["mean"] + y["mean"]) / 2)


@pytest.mark.parametrize("kind", ["fedbuff", "fedasync"])
def test_a_change_is_clipped_before_it_is_weighed(kind: str) -> None:
    """As the rounds' rule does (Sun et al., 2019): the weight of a stale update is no leave for a longer change."""
    y, b, x = drawn(1), drawn(2), drawn(3)
    schedule = Schedule(kind=kind, mixing=0.6, exponent=0.5)  # type: ignore[arg-type]
    weight = schedule.weight(3)
    change = y["w"] - (x if kind == "fedasync" else b)["w"]
    for bound in (0.5 * float(change.norm()), 2 * float(change.norm())):
        refresh = Refresh(schedule, SCHEMA, clip_of(EqualWeights(ClipNorm(bound))))
        found = refresh(Update(y, 5), ServerState(SCHEMA, b), ServerState(SCHEMA, x), 3).params
        kept = min(1.0, bound / float(change.norm()))
        torch.testing.assert_close(found["w"], x["w"] + weight * kept * change)
        torch.testing.assert_close(found["mean"], x["mean"] + weight * (y["mean"] - x["mean"]))


def test_what_is_not_stale_stays_bit_for_bit() -> None:
    found, y, _, _ = moved("fedbuff", 0)
    assert all(found[name] is y[name] for name in SHAPES)


def test_masks_are_the_same_by_their_values() -> None:
    def state(mask: Mask | None) -> ServerState:
        return ServerState(SCHEMA, drawn(0), mask=mask)

    kept, other = torch.arange(12).reshape(3, 4) % 3 == 0, torch.arange(12).reshape(3, 4) % 4 == 0
    assert same_mask(state(None), state(None))
    assert same_mask(state({"w": kept}), state({"w": kept.clone()}))
    assert not same_mask(state({"w": kept}), state({"w": other}))
    assert not same_mask(state({"w": kept}), state(None))
    assert not same_mask(state(None), state({"w": kept}))
