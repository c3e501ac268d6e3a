"""What is allowed but surely not meant is said, and a refusal names what stands in the way, not the next refusal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from federation import TINY, tiny

from fl_sim import Experiment
from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.parts import check, check_built

BUFFERED = ("schedule.kind=fedbuff", "network.links.4G=1")


@pytest.mark.parametrize("values", ["sign", "top1-ternary"])
def test_parameters_that_travel_as_signs_are_said(
    values: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        check(tiny(tmp_path, f"wire.uplink.values={values}", "wire.uplink.content=difference"))
        check(tiny(tmp_path, "wire.uplink.values=int8"))
        assert "coarsely" not in caplog.text
        check(tiny(tmp_path, f"wire.uplink.values={values}"))
    assert f"wire.uplink.values = '{values}': the parameters themselves travel so coarsely" in caplog.text


def test_personal_models_without_rounds_need_clients_that_measure_and_no_more(tmp_path: Path) -> None:
    fine_tuned = [*BUFFERED, "client=clients.presets:fine_tuned"]
    with pytest.raises(UserError, match=r"fine_tuned'.*needed: evaluate.clients above 0"):
        check_built(Federation.build(tiny(tmp_path, *fine_tuned), quiet=True))
    check_built(Federation.build(tiny(tmp_path, *fine_tuned, "evaluate.clients=2"), quiet=True))
    Experiment.from_tree(TINY, [*BUFFERED, "model.personal=head", "evaluate.clients=2"])
