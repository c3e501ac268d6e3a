"""The measures of scale, on small federations: what they report, not how fast anything is."""

from __future__ import annotations

import pytest

from fl_sim.bench import scale


@pytest.mark.slow
def test_each_measure_reports_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    few = scale._many

    def fewer(clients: int, cohort: int, *more: str, **given: object) -> object:
        return few(clients // 1000, max(1, cohort // 100), *more, **given)

    monkeypatch.setattr(scale, "_many", fewer)
    found = {name: value for measure in scale.MEASURES.values() for name, value in measure().items()}
    assert found.keys() == {
        "million_build_s",
        "million_build_mb",
        "million_run_s",
        "million_run_mb",
        "round_of_5000_s",
        "feedback_round_of_5000_s",
    }
    assert all(value >= 0 for value in found.values())
