"""`fl-sim bench async` at toy size: equal results on every engine, not how fast."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fl_sim.bench import asynchrony
from fl_sim.bench.workloads import NUDGE, Workload


def test_engines_are_measured_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Workload("mlp", clients=200, cohort=20, width=0.2, data="small_shape", client=NUDGE)
    monkeypatch.setattr(asynchrony, "MODEL", small)
    (row,) = asynchrony.measure(["inline"], updates=60, buffer=10, concurrency=20)
    assert row.updates == 60
    assert row.staleness > 0
    asynchrony.require_equal([row, replace(row, engine="workers:2", seconds=1.0)])
    with pytest.raises(RuntimeError, match="workers:2 gave"):
        asynchrony.require_equal([row, replace(row, engine="workers:2", ledger="0")])
