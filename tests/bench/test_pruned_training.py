"""`fl-sim bench pruned-training` on a tiny federation: what it reports, not how fast anything is."""

from __future__ import annotations

import pytest

from fl_sim.bench import contest, pruned_training
from fl_sim.bench.workloads import Workload
from fl_sim.core.types import UserError

TINY = Workload("resnet8", clients=8, cohort=1, steps=1, width=0.25, batch=4, data="small_shape")


def test_masked_and_cut_rounds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "TURN_S", 0.001)
    found = pruned_training.measure(budgets=[0.5], precisions=["float32"], repeats=2, work=TINY)
    names = {f"{who}_float32_s_per_round" for who in ("dense", "masked_0.5", "cut_0.5")}
    names |= {f"cut_0.5_over_{who}_float32" for who in ("dense", "masked")}
    assert found.keys() == names | {f"{name}_{q}" for name in names for q in ("q1", "q3")}
    assert all(isinstance(value, float) and value > 0 for value in found.values())


def test_an_unknown_precision_is_one_line() -> None:
    with pytest.raises(UserError, match="float8"):
        pruned_training.measure(budgets=[0.5], precisions=["float8"], repeats=2, work=TINY)
