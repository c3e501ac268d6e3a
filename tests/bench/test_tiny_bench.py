"""The benchmark of tiny models: its models, and what it reports."""

from __future__ import annotations

import time

import pytest

from fl_sim.bench import contest
from fl_sim.bench.tiny import WORKS, measure
from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation

SIZES = {"mlp": 2_410, "logistic": 650, "cnn": 3_818, "gru": 2_698, "cnn_bn": 24_058, "mlp_784": 101_770}


@pytest.mark.parametrize("name", WORKS)
def test_models_have_the_sizes_that_are_told(name: str) -> None:
    model = Federation.build(WORKS[name].on("inline")).first.model
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


def test_both_engines_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "TURN_S", 0.01)
    found = measure(works=["logistic"], cohorts=[4], repeats=2, overrides=["wire.uplink.values=float16"], steps=1)
    for engine in ("inline", "cohort"):
        low, middle, high = (float(found[f"logistic_4_{engine}_updates_per_s{q}"]) for q in ("_q1", "", "_q3"))
        assert 0 < low <= middle <= high
    assert float(found["logistic_4_cohort_over_inline"]) > 0


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--models = 'lenet': unknown; allowed: mlp, logistic"):
        measure(works=["lenet"], cohorts=[4], repeats=2)
    with pytest.raises(UserError, match=r"--beside = 'ray': unknown; allowed: inline, workers"):
        measure(works=["mlp"], cohorts=[4], repeats=2, beside="ray")
    with pytest.raises(UserError, match=r"--processor-time: --beside workers computes in other processes"):
        measure(works=["mlp"], cohorts=[4], repeats=2, beside="workers", processor_time=True)


def test_processor_time_leaves_out_what_is_waited_for() -> None:
    def wait() -> None:
        time.sleep(0.05)

    found = contest.alternate({"waits": wait}, repeats=2, clock=time.process_time)
    assert all(seconds < 0.025 for seconds in found["waits"].seconds)
